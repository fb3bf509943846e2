// Changed files for fused_rnn_describe_file: whatever their bytes are, it returns, reads nothing outside of them, and
// what it takes for a file of weights has all of them inside.
//
//     fuzz_file SECONDS SEED FILE...
//
// Compiled with -fsanitize=address,undefined together with csrc/library/file.cpp and description.cpp. Prints how many
// files it tried, how many were taken, and how often each error was the answer.
#include <fused_rnn.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <string>
#include <vector>

// file.cpp's fused_rnn_weights_load wants it; nothing here loads.
int fused_rnn_weights_create(const fused_rnn_description*, void*, size_t, fused_rnn_weights**) { std::abort(); }

namespace {

using Bytes = std::vector<char>;

std::mt19937_64 random_bits;

size_t below(size_t n) { return n == 0 ? 0 : size_t(random_bits() % n); }

uint64_t header_length(const Bytes& file) {
  uint64_t length = 0;
  if (file.size() >= 8) std::memcpy(&length, file.data(), 8);
  return length;
}

void set_header_length(Bytes& file, uint64_t length) {
  if (file.size() >= 8) std::memcpy(file.data(), &length, 8);
}

// Pieces of headers, and what is not quite one.
const char* const pieces[] = {
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\"",
    "\\",
    "\\u0000",
    "\xff",
    "\"a\"",
    "0",
    "-1",
    "1e9",
    "01",
    "1.0",
    "true",
    "null",
    "[[[[[[",
    "{{{{{{",
    "  ",
    "\n",
    "\xc3\xa9",
    "\xed\xa0\x80",
    "18446744073709551615",
    "18446744073709551616",
    "9223372036854775807",
    "4294967296",
    "weight_ih_l0",
    "bias_hh_l0",
    "weight_hh_l63",
    "weight_ih_l00",
    "__metadata__",
    "\"dtype\":\"F32\",",
    "\"shape\":[3,5],",
    "\"data_offsets\":[0,8],",
    "0x1.8000000000000p+0",
    "0x1.fffffffffffffp+1023",
    "lstm",
    "gru",
};

void change(Bytes& file, const std::vector<Bytes>& corpus) {
  const size_t header_end = size_t(std::min<uint64_t>(8 + header_length(file), file.size()));
  const size_t at = below(4) == 0 ? below(file.size()) : below(header_end);
  const auto resize_header = [&](int64_t by) {
    if (below(4) != 0) set_header_length(file, header_length(file) + uint64_t(by));
  };
  if (file.empty()) {
    file = corpus[below(corpus.size())];
    return;
  }
  switch (below(10)) {
    case 0: file[at] = char(random_bits()); break;
    case 1: file[at] = char(file[at] ^ (1 << below(8))); break;
    case 2: file.resize(at); break;
    case 3: {
      const size_t n = std::min(below(40) + 1, file.size() - at);
      file.erase(file.begin() + long(at), file.begin() + long(at + n));
      resize_header(-int64_t(n));
      break;
    }
    case 4: {
      const std::string piece = pieces[below(sizeof pieces / sizeof *pieces)];
      file.insert(file.begin() + long(at), piece.begin(), piece.end());
      resize_header(int64_t(piece.size()));
      break;
    }
    case 5: {
      const size_t n = std::min(below(200) + 1, file.size() - at);
      const Bytes copy(file.begin() + long(at), file.begin() + long(at + n));
      const size_t to = below(header_end);
      file.insert(file.begin() + long(to), copy.begin(), copy.end());
      resize_header(int64_t(n));
      break;
    }
    case 6: {
      static const uint64_t lengths[] = {
          0, 1, 7, 8, uint64_t(1) << 22, (uint64_t(1) << 22) + 1, UINT64_MAX, UINT64_MAX - 7, uint64_t(1) << 63};
      set_header_length(file, below(2) ? lengths[below(sizeof lengths / sizeof *lengths)] : below(2 * file.size()));
      break;
    }
    case 7: {  // a digit of a number
      for (size_t i = at; i < header_end; ++i) {
        if (file[i] >= '0' && file[i] <= '9') {
          file[i] = char('0' + below(10));
          break;
        }
      }
      break;
    }
    case 8: {  // two parts change places
      const size_t other = below(header_end), n = std::min({below(60) + 1, file.size() - at, file.size() - other});
      for (size_t i = 0; i < n; ++i) std::swap(file[at + i], file[other + i]);
      break;
    }
    default: file.insert(file.end(), below(20), 'x');
  }
}

int64_t gates_of(const fused_rnn_description& d) {
  return d.cell == FUSED_RNN_CELL_LSTM ? 4 : d.cell == FUSED_RNN_CELL_GRU ? 3 : 1;
}

// Every byte of every weight, by the sizes that the description says; the sanitizer sees where they are.
void read_all(const fused_rnn_description& d, const char* begin, const char* end) {
  const int64_t element = d.dtype == FUSED_RNN_FLOAT64 ? 8 : d.dtype == FUSED_RNN_FLOAT32 ? 4 : 2;
  const int64_t H = d.hidden_size, P = d.proj_size ? d.proj_size : H, GH = gates_of(d) * H;
  unsigned sum = 0;
  int64_t all = 0;
  const auto read = [&](const void* from, int64_t count) {
    if (!from) return;
    const char* p = static_cast<const char*>(from);
    if (p < begin || end - p < count * element || reinterpret_cast<uintptr_t>(p) % uintptr_t(element) != 0) {
      std::puts("a weight is not inside of the file");
      std::abort();
    }
    for (int64_t i = 0; i < count * element; ++i) sum += unsigned(p[i]);
    all += count * element;
  };
  for (int64_t l = 0; l < d.num_layers; ++l) {
    const fused_rnn_layer& w = d.layers[l];
    if (!w.weight_ih || !w.weight_hh) {
      std::puts("a weight is missing");
      std::abort();
    }
    read(w.weight_ih, GH * (l == 0 ? d.input_size : P));
    read(w.weight_hh, GH * (P / (d.num_heads > 1 ? d.num_heads : 1)));
    read(w.bias_ih, GH);
    read(w.bias_hh, GH);
    read(w.weight_hr, P * H);
    read(w.weight_peephole, 3 * H);
    read(w.weight_norm_ih, GH);
    read(w.weight_norm_hh, GH);
    read(w.weight_norm_c, H);
    read(w.bias_norm_c, H);
  }
  if (all > end - begin) {
    std::puts("weights are longer than the file");
    std::abort();
  }
  static volatile unsigned kept;
  kept = sum;
}

// As long as its contents and no longer, so that the byte behind them is none of the program's.
int describe(const Bytes& file, int64_t capacity = FUSED_RNN_MOST_LAYERS) {
  void* copy = std::malloc(file.size());  // aligned to 16
  if (!file.empty()) std::memcpy(copy, file.data(), file.size());
  fused_rnn_layer layers[FUSED_RNN_MOST_LAYERS];
  fused_rnn_description description = {};
  description.struct_size = uint32_t(sizeof description);
  description.layer_size = uint32_t(sizeof *layers);
  const int error = fused_rnn_describe_file(copy, file.size(), layers, capacity, &description);
  if (!error) {
    const char* begin = static_cast<const char*>(copy);
    read_all(description, begin, begin + file.size());
  }
  std::free(copy);
  return error;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  const double seconds = std::atof(argv[1]);
  random_bits.seed(std::strtoull(argv[2], nullptr, 10));
  std::vector<Bytes> corpus;
  for (int i = 3; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    if (!file || corpus.back().empty()) return 2;
    if (std::strstr(argv[i], "valid") && describe(corpus.back()) != FUSED_RNN_OK) {
      std::printf("%s is refused: %s\n", argv[i], fused_rnn_error_text(describe(corpus.back())));
      return 1;
    }
  }
  std::map<int, long> answers;
  long tried = 0;
  const auto begin = std::chrono::steady_clock::now();
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() < seconds) {
    for (int i = 0; i < 100; ++i, ++tried) {
      Bytes file = corpus[below(corpus.size())];
      for (size_t changes = 1 + below(4); changes > 0; --changes) change(file, corpus);
      ++answers[describe(file, below(8) == 0 ? int64_t(below(3)) : FUSED_RNN_MOST_LAYERS)];
    }
  }
  std::printf("tried %ld\n", tried);
  for (const auto& answer : answers)
    std::printf("%d %ld %s\n", answer.first, answer.second, fused_rnn_error_text(answer.first));
  return 0;
}
