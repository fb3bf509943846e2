// Files of the safetensors format as fused_rnn.save_weights (fused_rnn/saving.py) writes them: 8 bytes with the length
// of the header, the header, which is JSON, and behind it the data of the tensors, side by side. What stands in the
// header is known, so this reads no JSON in general: names and values without escapes, two levels, whole numbers.
// Nothing is copied or allocated, and whatever the bytes are, nothing outside of them is read.
#define FUSED_RNN_BUILDS_LIBRARY
#include <sys/stat.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "description.h"
#include "fused_rnn.h"

using namespace fused_rnn;

namespace {

constexpr uint64_t longest_header = uint64_t(1) << 22;

// A string of the header, without its quotes.
struct Text {
  const char* data = nullptr;
  size_t size = 0;

  bool operator==(const char* other) const { return size == std::strlen(other) && std::memcmp(data, other, size) == 0; }
  bool begins_with(const char* other) const {
    const size_t n = std::strlen(other);
    return size >= n && std::memcmp(data, other, n) == 0;
  }
  Text from(size_t first) const { return {data + first, size - first}; }
};

// Reads one thing after the other; after the first that is not there every answer is false.
class Cursor {
 public:
  Cursor(const char* begin, const char* end) : at_(begin), end_(end) {}

  bool take(char c) {
    skip_spaces();
    if (at_ == end_ || *at_ != c) return fail();
    ++at_;
    return true;
  }
  // Whether c comes next; it is not taken.
  bool sees(char c) {
    skip_spaces();
    return at_ != end_ && *at_ == c;
  }
  bool take_text(Text& text) {
    if (!take('"')) return false;
    text.data = at_;
    for (; at_ != end_ && *at_ != '"'; ++at_) {
      if (*at_ < 0x20 || *at_ > 0x7e || *at_ == '\\') return fail();
    }
    text.size = size_t(at_ - text.data);
    return take('"');
  }
  bool take_number(uint64_t& number) {
    skip_spaces();
    const char* first = at_;
    for (number = 0; at_ != end_ && is_digit(*at_); ++at_) {
      if (number > (UINT64_MAX - 9) / 10) return fail();
      number = number * 10 + uint64_t(*at_ - '0');
    }
    return at_ != first && (*first != '0' || at_ == first + 1) ? true : fail();
  }
  // Calls member() for each of { ... } or [ ... ], which are separated by commas.
  template <class F>
  bool take_members(char open, char close, F member) {
    if (!take(open)) return false;
    if (sees(close)) return take(close);
    while (member()) {
      if (sees(close)) return take(close);
      if (!take(',')) return false;
    }
    return fail();
  }
  bool at_end() {
    for (; at_ != end_; ++at_) {
      if (*at_ != ' ') return fail();
    }
    return true;
  }
  static bool is_digit(char c) { return c >= '0' && c <= '9'; }

 private:
  void skip_spaces() {
    while (at_ != end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\n' || *at_ == '\r')) ++at_;
  }
  bool fail() {
    at_ = end_;
    return false;
  }
  const char *at_, *end_;
};

bool read_number(Text text, int64_t& number) {
  Cursor cursor(text.data, text.data + text.size);
  uint64_t value = 0;
  if (text.size == 0 || text.data[0] == ' ' || !cursor.take_number(value) || value > INT64_MAX) return false;
  number = int64_t(value);
  // The end, without spaces.
  return Cursor::is_digit(text.data[text.size - 1]) && cursor.at_end();
}

int hexadecimal(char c) { return Cursor::is_digit(c) ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1; }

// A number that is not negative as Python's float.hex writes it: 0x1.<13 digits>p+<exponent>, and 0x0.0p+0. It is
// exact, and no locale changes it. Denormal numbers and infinities are refused.
bool read_real(Text text, double& number) {
  if (text == "0x0.0p+0") {
    number = 0;
    return true;
  }
  constexpr size_t first_digit = 4, digits = 13, exponent_at = first_digit + digits;
  if (!text.begins_with("0x1.") || text.size < exponent_at + 3 || text.data[exponent_at] != 'p') return false;
  uint64_t mantissa = 0;
  for (size_t i = first_digit; i < exponent_at; ++i) {
    const int digit = hexadecimal(text.data[i]);
    if (digit < 0) return false;
    mantissa = mantissa << 4 | uint64_t(digit);
  }
  const char sign = text.data[exponent_at + 1];
  int64_t exponent = 0;
  if ((sign != '+' && sign != '-') || !read_number(text.from(exponent_at + 2), exponent)) return false;
  if (exponent > (sign == '+' ? 1023 : 1022) || (sign == '-' && exponent == 0)) return false;
  const uint64_t bits = uint64_t(1023 + (sign == '+' ? exponent : -exponent)) << 52 | mantissa;
  std::memcpy(&number, &bits, sizeof number);
  return true;
}

struct Tensor {
  Text name, dtype;
  uint64_t shape[2] = {0, 1};
  int dimensions = 0;
  uint64_t begin = 0, end = 0;
};

bool take_tensor(Cursor& cursor, Tensor& tensor) {
  bool has_dtype = false, has_shape = false, has_offsets = false;
  const auto once = [](bool& seen) {
    const bool first = !seen;
    seen = true;
    return first;
  };
  const bool complete = cursor.take_members('{', '}', [&] {
    Text key;
    if (!cursor.take_text(key) || !cursor.take(':')) return false;
    if (key == "dtype") return once(has_dtype) && cursor.take_text(tensor.dtype);
    if (key == "shape") {
      return once(has_shape) && cursor.take_members('[', ']', [&] {
        uint64_t size = 0;
        if (!cursor.take_number(size)) return false;
        // What has more dimensions is of another shape than any of ours; they are counted alone.
        if (tensor.dimensions < 2) tensor.shape[tensor.dimensions] = size;
        if (tensor.dimensions < 3) ++tensor.dimensions;
        return true;
      });
    }
    if (key == "data_offsets") {
      int count = 0;
      const bool read = once(has_offsets) && cursor.take_members('[', ']', [&] {
        uint64_t& offset = count == 0 ? tensor.begin : tensor.end;
        return count++ < 2 && cursor.take_number(offset);
      });
      return read && count == 2;
    }
    return false;
  });
  return complete && has_dtype && has_shape && has_offsets;
}

// Reads the header from its beginning to its end: on_metadata(key, value) and on_tensor(tensor) return an error or 0,
// of which the first ends it.
template <class OnMetadata, class OnTensor>
int walk(const char* begin, const char* end, OnMetadata on_metadata, OnTensor on_tensor) {
  int error = FUSED_RNN_OK;
  bool has_metadata = false;
  if (begin == end || *begin != '{') return FUSED_RNN_ERROR_FILE_HEADER;
  Cursor cursor(begin, end);
  const bool complete = cursor.take_members('{', '}', [&] {
    Tensor tensor;
    if (!cursor.take_text(tensor.name) || !cursor.take(':')) return false;
    if (tensor.name == "__metadata__") {
      if (has_metadata) return false;
      has_metadata = true;
      return cursor.take_members('{', '}', [&] {
        Text key, value;
        if (!cursor.take_text(key) || !cursor.take(':') || !cursor.take_text(value)) return false;
        error = on_metadata(key, value);
        return error == FUSED_RNN_OK;
      });
    }
    if (!take_tensor(cursor, tensor)) return false;
    error = on_tensor(tensor);
    return error == FUSED_RNN_OK;
  });
  if (error) return error;
  return complete && cursor.at_end() ? FUSED_RNN_OK : FUSED_RNN_ERROR_FILE_HEADER;
}

// ---- what the header says of the layers ----

struct Name {
  const char* text;
  int32_t value;
};
constexpr Name cells[] = {{"rnn", FUSED_RNN_CELL_RNN}, {"lstm", FUSED_RNN_CELL_LSTM}, {"gru", FUSED_RNN_CELL_GRU}};
constexpr Name dtypes[] = {
    {"float32", FUSED_RNN_FLOAT32}, {"float64", FUSED_RNN_FLOAT64}, {"bfloat16", FUSED_RNN_BFLOAT16}};
constexpr Name activations[] = {{"tanh", FUSED_RNN_TANH},         {"sigmoid", FUSED_RNN_SIGMOID},
                                {"relu", FUSED_RNN_RELU},         {"hard_sigmoid", FUSED_RNN_HARD_SIGMOID},
                                {"softsign", FUSED_RNN_SOFTSIGN}, {"identity", FUSED_RNN_IDENTITY}};

template <size_t n>
bool read_name(const Name (&names)[n], Text text, int32_t& value) {
  for (const Name& name : names) {
    if (text == name.text) {
      value = name.value;
      return true;
    }
  }
  return false;
}

bool read_flag(Text text, int32_t& flag) {
  flag = text == "1";
  return flag || text == "0";
}

struct Metadata {
  fused_rnn_description description{};
  int64_t version = 0, biases = 0;  // biases: how many vectors of them each layer has

  // Every key once, and no other.
  static constexpr const char* keys[] = {
      "format",      "format_version", "cell",      "dtype",   "num_layers",    "input_size",
      "hidden_size", "proj_size",      "num_heads", "biases",  "activation",    "recurrent_activation",
      "layer_norm",  "peephole",       "cell_clip", "zoneout", "coupled_gates", "zoneout_cell",
  };
  static constexpr uint32_t all_keys = (uint32_t(1) << sizeof(keys) / sizeof(keys[0])) - 1;
  uint32_t seen = 0;

  int add(Text key, Text value) {
    uint32_t bit = 0;
    for (uint32_t i = 0; (all_keys >> i) != 0; ++i) {
      if (key == keys[i]) bit = uint32_t(1) << i;
    }
    if (bit == 0 || (seen & bit) != 0) return FUSED_RNN_ERROR_FILE_METADATA;
    seen |= bit;
    return read(key, value) ? FUSED_RNN_OK : FUSED_RNN_ERROR_FILE_METADATA;
  }

 private:
  bool read(Text key, Text value) {
    fused_rnn_description& d = description;
    if (key == "format") return value == "fused_rnn.weights";
    if (key == "format_version") return read_number(value, version);
    if (key == "cell") return read_name(cells, value, d.cell);
    if (key == "dtype") return read_name(dtypes, value, d.dtype);
    if (key == "num_layers") return read_number(value, d.num_layers);
    if (key == "input_size") return read_number(value, d.input_size);
    if (key == "hidden_size") return read_number(value, d.hidden_size);
    if (key == "proj_size") return read_number(value, d.proj_size);
    if (key == "num_heads") return read_number(value, d.num_heads);
    if (key == "biases") return read_number(value, biases) && biases <= 2;
    if (key == "activation") return read_name(activations, value, d.activation);
    if (key == "recurrent_activation") return read_name(activations, value, d.recurrent_activation);
    if (key == "peephole") return read_flag(value, d.peephole);
    if (key == "coupled_gates") return read_flag(value, d.coupled_gates);
    if (key == "layer_norm") return read_flag(value, d.layer_norm);
    if (key == "cell_clip") return read_real(value, d.cell_clip);
    if (key == "zoneout") return read_real(value, d.zoneout);
    return read_real(value, d.zoneout_cell);
  }
};

// ---- the tensors ----

// One of a layer: its name but for the number of the layer, where it goes, and its shape in layer l.
struct Kind {
  const char* name;
  const void* fused_rnn_layer::* place;
  bool wanted;
  int64_t rows, columns;  // columns 0: of one dimension
};

struct Kinds {
  static constexpr int count = 10;
  Kind all[count];

  Kinds(const Metadata& metadata, int64_t layer) {
    const fused_rnn_description& d = metadata.description;
    const int64_t H = d.hidden_size, P = state_size_of(d), GH = gates_of(d.cell) * H;
    const int64_t I = layer == 0 ? d.input_size : P;
    const bool normalises = d.layer_norm != 0, of_cell = normalises && d.cell == FUSED_RNN_CELL_LSTM;
    const Kind kinds[count] = {
        {"weight_ih_l", &fused_rnn_layer::weight_ih, true, GH, I},
        {"weight_hh_l", &fused_rnn_layer::weight_hh, true, GH, P / heads_of(d)},
        {"bias_ih_l", &fused_rnn_layer::bias_ih, metadata.biases > 0, GH, 0},
        {"bias_hh_l", &fused_rnn_layer::bias_hh, metadata.biases > 1, GH, 0},
        {"weight_hr_l", &fused_rnn_layer::weight_hr, d.proj_size > 0, P, H},
        {"weight_peephole_l", &fused_rnn_layer::weight_peephole, d.peephole != 0, 3 * H, 0},
        {"weight_norm_ih_l", &fused_rnn_layer::weight_norm_ih, normalises, GH, 0},
        {"weight_norm_hh_l", &fused_rnn_layer::weight_norm_hh, normalises, GH, 0},
        {"weight_norm_c_l", &fused_rnn_layer::weight_norm_c, of_cell, H, 0},
        {"bias_norm_c_l", &fused_rnn_layer::bias_norm_c, of_cell && metadata.biases > 0, H, 0},
    };
    std::memcpy(all, kinds, sizeof all);
  }

  static uint64_t elements(const Kind& kind) { return uint64_t(kind.rows * (kind.columns ? kind.columns : 1)); }
};

// The tensors' data, and where each of them was found.
struct Data {
  const char* begin;
  uint64_t bytes;
};

int place_tensor(const Metadata& metadata, const Tensor& tensor, Data data, fused_rnn_layer* layers) {
  const fused_rnn_description& d = metadata.description;
  const Kinds names(metadata, 0);
  for (int i = 0; i < Kinds::count; ++i) {
    int64_t layer = 0;
    const char* name = names.all[i].name;
    if (!tensor.name.begins_with(name) || !read_number(tensor.name.from(std::strlen(name)), layer)) continue;
    if (layer >= d.num_layers) break;
    const Kinds kinds(metadata, layer);
    const Kind& kind = kinds.all[i];
    if (!kind.wanted) break;
    const void*& place = layers[layer].*kind.place;
    if (place) return FUSED_RNN_ERROR_FILE_TENSOR_TWICE;
    const char* dtype = d.dtype == FUSED_RNN_FLOAT64 ? "F64" : d.dtype == FUSED_RNN_FLOAT32 ? "F32" : "BF16";
    if (!(tensor.dtype == dtype)) return FUSED_RNN_ERROR_FILE_TENSOR_DTYPE;
    if (tensor.dimensions != (kind.columns ? 2 : 1) || tensor.shape[0] != uint64_t(kind.rows) ||
        (kind.columns && tensor.shape[1] != uint64_t(kind.columns)))
      return FUSED_RNN_ERROR_FILE_TENSOR_SHAPE;
    const uint64_t bytes = Kinds::elements(kind) * uint64_t(bytes_of(d.dtype));
    if (tensor.end > data.bytes || tensor.begin > tensor.end || tensor.end - tensor.begin != bytes)
      return FUSED_RNN_ERROR_FILE_OFFSETS;
    place = data.begin + tensor.begin;
    if (reinterpret_cast<uintptr_t>(place) % uintptr_t(bytes_of(d.dtype)) != 0) return FUSED_RNN_ERROR_FILE_OFFSETS;
    return FUSED_RNN_OK;
  }
  return FUSED_RNN_ERROR_FILE_TENSOR_NAME;
}

// Calls f(data, bytes) for each tensor that the layers have, as long as it returns true.
template <class F>
bool each_tensor(const Metadata& metadata, const fused_rnn_layer* layers, F f) {
  for (int64_t l = 0; l < metadata.description.num_layers; ++l) {
    const Kinds kinds(metadata, l);
    for (const Kind& kind : kinds.all) {
      if (!kind.wanted) continue;
      const uint64_t bytes = Kinds::elements(kind) * uint64_t(bytes_of(metadata.description.dtype));
      if (!f(static_cast<const char*>(layers[l].*kind.place), bytes)) return false;
    }
  }
  return true;
}

int check_tensors(const Metadata& metadata, Data data, const fused_rnn_layer* layers) {
  uint64_t all = 0;
  const bool complete = each_tensor(metadata, layers, [&](const char* tensor, uint64_t bytes) {
    all += bytes;
    return tensor != nullptr;
  });
  if (!complete) return FUSED_RNN_ERROR_FILE_TENSOR_MISSING;
  // Together they are as long as the data, and no two overlap: so there is no gap.
  if (all != data.bytes) return FUSED_RNN_ERROR_FILE_OFFSETS;
  int64_t i = 0;
  const bool apart = each_tensor(metadata, layers, [&](const char* a, uint64_t a_bytes) {
    int64_t k = 0;
    ++i;
    return each_tensor(metadata, layers, [&](const char* b, uint64_t b_bytes) {
      return ++k == i || a + a_bytes <= b || b + b_bytes <= a;
    });
  });
  return apart ? FUSED_RNN_OK : FUSED_RNN_ERROR_FILE_OFFSETS;
}

}  // namespace

int fused_rnn_describe_file(const void* data, size_t size, fused_rnn_layer* layers, int64_t capacity,
                            fused_rnn_description* description) {
  if (!data) return FUSED_RNN_ERROR_DATA_NULL;
  if (reinterpret_cast<uintptr_t>(data) % 8 != 0) return FUSED_RNN_ERROR_DATA_ALIGNMENT;
  if (!layers || capacity < 1) return FUSED_RNN_ERROR_CAPACITY;
  if (!description) return FUSED_RNN_ERROR_RESULT_NULL;
  if (reinterpret_cast<uintptr_t>(layers) % alignof(fused_rnn_layer) != 0) return FUSED_RNN_ERROR_ALIGNMENT;
  if (size < 8) return FUSED_RNN_ERROR_FILE_SIZE;
  uint64_t header_bytes = 0;
  for (int i = 7; i >= 0; --i) header_bytes = header_bytes << 8 | static_cast<const unsigned char*>(data)[i];
  if (header_bytes > longest_header) return FUSED_RNN_ERROR_FILE_HEADER;
  if (header_bytes > size - 8) return FUSED_RNN_ERROR_FILE_SIZE;
  const char *header = static_cast<const char*>(data) + 8, *end = header + header_bytes;
  const Data tensors{end, size - 8 - header_bytes};

  Metadata metadata;
  if (const int error = walk(
          header, end, [&](Text key, Text value) { return metadata.add(key, value); }, [](const Tensor&) { return 0; }))
    return error;
  if (metadata.seen != Metadata::all_keys) return FUSED_RNN_ERROR_FILE_METADATA;
  if (metadata.version != 1) return FUSED_RNN_ERROR_FILE_VERSION;
  fused_rnn_description& own = metadata.description;
  own.struct_size = uint32_t(sizeof own);
  own.layer_size = uint32_t(sizeof(fused_rnn_layer));
  if (own.cell == FUSED_RNN_CELL_RNN) {
    // An RNN has no gates; its files say sigmoid all the same.
    if (own.recurrent_activation != FUSED_RNN_SIGMOID) return FUSED_RNN_ERROR_RECURRENT_ACTIVATION;
    own.recurrent_activation = 0;
  }
  fused_rnn_description checked;
  if (const int error = read_description(&own, checked)) return error;
  if (own.cell == FUSED_RNN_CELL_GRU && metadata.biases == 1) return FUSED_RNN_ERROR_BIAS;
  if (capacity < own.num_layers) return FUSED_RNN_ERROR_CAPACITY;

  fused_rnn_layer found[FUSED_RNN_MOST_LAYERS] = {};
  if (const int error = walk(
          header, end, [](Text, Text) { return 0; },
          [&](const Tensor& tensor) { return place_tensor(metadata, tensor, tensors, found); }))
    return error;
  if (const int error = check_tensors(metadata, tensors, found)) return error;
  own.layers = layers;
  if (const int error = write_description(own, description)) return error;
  write_layers(found, own.num_layers, description->layer_size, layers);
  return FUSED_RNN_OK;
}

namespace {

// The whole file, in memory that free() gives back.
int read_file(const char* path, void*& data, size_t& size) {
  std::FILE* file = std::fopen(path, "rb");
  if (!file) return FUSED_RNN_ERROR_FILE_OPEN;
  struct stat about;
  int error = FUSED_RNN_ERROR_FILE_READ;
  if (fstat(fileno(file), &about) == 0 && S_ISREG(about.st_mode)) {
    size = size_t(about.st_size);
    data = std::malloc(size > 0 ? size : 1);
    error = !data                                     ? FUSED_RNN_ERROR_OUT_OF_MEMORY
            : std::fread(data, 1, size, file) == size ? FUSED_RNN_OK
                                                      : FUSED_RNN_ERROR_FILE_READ;
  }
  std::fclose(file);
  if (error) {
    std::free(data);
    data = nullptr;
  }
  return error;
}

}  // namespace

int fused_rnn_weights_load(const char* path, const char* instruction_set, fused_rnn_weights** weights) {
  if (!path) return FUSED_RNN_ERROR_PATH_NULL;
  if (!weights) return FUSED_RNN_ERROR_RESULT_NULL;
  void* data = nullptr;
  size_t size = 0;
  if (const int error = read_file(path, data, size)) return error;
  fused_rnn_layer layers[FUSED_RNN_MOST_LAYERS];
  fused_rnn_description description = {};
  description.struct_size = uint32_t(sizeof description);
  description.layer_size = uint32_t(sizeof *layers);
  int error = fused_rnn_describe_file(data, size, layers, FUSED_RNN_MOST_LAYERS, &description);
  description.instruction_set = instruction_set;
  if (!error) error = fused_rnn_weights_create(&description, nullptr, 0, weights);
  std::free(data);
  return error;
}
