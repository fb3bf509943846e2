// Runs a package that AOTInductor has made of a model with fused_rnn's layers, without Python:
//
//     run_package libfused_rnn.so model.pt2 output.pt input.pt...
//
// Inputs are tensors as torch.save writes them, output.pt is the tuple of results, for torch.load. How to build it:
// docs/exporting.md.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

at::Tensor read_tensor(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return torch::jit::pickle_load({std::istreambuf_iterator<char>(file), {}}).toTensor();
}

void run(const std::vector<std::string>& arguments) {
  // The library registers the operators as it is loaded. A program may as well be linked with it.
  if (!dlopen(arguments[0].c_str(), RTLD_NOW | RTLD_LOCAL)) throw std::runtime_error(dlerror());
  torch::inductor::AOTIModelPackageLoader model(arguments[1]);
  std::vector<at::Tensor> inputs;
  for (size_t i = 3; i < arguments.size(); ++i) inputs.push_back(read_tensor(arguments[i]));
  const std::vector<at::Tensor> outputs = model.run(inputs);
  const std::vector<char> results =
      torch::jit::pickle_save(c10::ivalue::Tuple::create({outputs.begin(), outputs.end()}));
  std::ofstream file(arguments[2], std::ios::binary);
  file.write(results.data(), std::streamsize(results.size()));
  if (!file.flush()) throw std::runtime_error("cannot write " + arguments[2]);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: run_package libfused_rnn.so model.pt2 output.pt input.pt...\n";
    return 2;
  }
  try {
    run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  return 0;
}
