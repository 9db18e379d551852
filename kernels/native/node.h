// A node of the graph as its kernels see it: attributes when it is made, tensors when it runs.
#pragma once

#include <stdexcept>
#include <string>

#include "ort_abi.h"
#include "problem.h"

namespace optimize {

constexpr int MAX_DIMS = 8;
constexpr int MAX_INPUTS = 8;
constexpr int MAX_OUTPUTS = 2;

struct Shape {
  int64_t dims[MAX_DIMS];
  int count;
  int64_t elements(int from, int to) const;
  int64_t last() const { return dims[count - 1]; }
  bool operator==(const Shape& other) const;
  std::string text() const;  // [1, 8, 77, 64]
};

struct Tensor {
  void* data;
  Shape shape;
  int type;  // ORT_FLOAT, ORT_FLOAT16 or ORT_BOOL
};

struct Attributes {
  int64_t causal = 0, groups = 0, interleaved = 0, heads = 0, kv_heads = 0;
  float scale = 0, epsilon = 0;
  bool tanh = false;  // approximate = "tanh"
};

// One run of a node. The outputs are asked for by `output`, whose shapes are those of inputs.
struct Call {
  const OrtApi* api;
  OrtKernelContext* context;
  const Attributes& attributes;
  const char* name;
  int type;  // of the tensors: ORT_FLOAT or ORT_FLOAT16
  int input_count;
  Tensor inputs[MAX_INPUTS];
  Tensor output(int index, const Shape& shape) const;
  [[noreturn]] void fail(const char* argument, const std::string& got, const std::string& expected) const;
};

// Throws where ONNX Runtime returned an error
void check(const OrtApi* api, OrtStatus* status);

// An operator of the domain: what it takes, and what runs it on the CPU and on CUDA
struct Operator {
  const char* name;
  int inputs, outputs;
  int output_like[MAX_OUTPUTS];  // the input whose shape an output has
  const char* attributes;        // names, separated by spaces
  void (*cpu)(const Call&, const Host&);
  void (*cuda)(const Call&, void* stream);
  int angles = MAX_INPUTS;  // inputs from here on are fp32 whatever the others are
};

extern const Operator OPERATORS[];
extern const int OPERATOR_COUNT;

// What the nodes mean, as problems with all shapes checked. CPU and CUDA kernels start from the same.
AttentionProblem attention_problem(const Call&);
NormProblem norm_problem(const Call&);
GroupNormProblem group_norm_problem(const Call&);
RopeProblem rope_problem(const Call&);
GatedProblem gated_problem(const Call&);

}  // namespace optimize
