// What the programs of tests/test_arm.py are told on their standard input and answer on their standard output: numbers
// of 64 bits, and arrays as they stand in memory, each after the count of its bytes. An array of none is null.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace wire {

// Aligned as memory that a framework gives is, and no byte longer than it says, so that an emulator may notice.
struct Array {
  void* data = nullptr;
  int64_t bytes = 0;
};

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(2);
}

inline void read(void* to, size_t bytes) {
  if (bytes > 0 && std::fread(to, 1, bytes, stdin) != bytes) fail("the input ends too early");
}

inline int64_t read_integer() {
  int64_t value;
  read(&value, sizeof value);
  return value;
}

inline double read_number() {
  double value;
  read(&value, sizeof value);
  return value;
}

// Zeros.
inline Array room(int64_t bytes) {
  Array array;
  array.bytes = bytes;
  if (bytes == 0) return array;
  if (bytes < 0 || bytes > (int64_t(1) << 30)) fail("an array of no possible size");
  array.data = std::calloc(size_t(bytes), 1);
  if (!array.data) fail("out of memory");
  return array;
}

inline Array read_array() {
  Array array = room(read_integer());
  read(array.data, size_t(array.bytes));
  return array;
}

inline void write(const Array& array) {
  if (std::fwrite(&array.bytes, sizeof array.bytes, 1, stdout) != 1) fail("cannot write");
  const size_t bytes = size_t(array.bytes);
  if (bytes > 0 && std::fwrite(array.data, 1, bytes, stdout) != bytes) fail("cannot write");
}

inline void write_text(const char* text) {
  int64_t count = 0;
  while (text[count]) ++count;
  write(Array{const_cast<char*>(text), count});
}

}  // namespace wire
