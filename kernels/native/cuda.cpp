// From a problem to a launch: which cubin, which grid, which arguments. The names are those of the Triton kernels'
// arguments (kernels/triton_*.py), whose launchers in Python do the same.
#include "cuda.h"

#include <string.h>

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "driver.h"

namespace optimize {
namespace {

using Numbers = std::map<std::string, int64_t>;

int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

struct Argument {
  std::string name, type;
};

// A cubin with its texts read
struct Kernel {
  const Cubin* cubin;
  Numbers constants;
  std::vector<Argument> arguments;
  int64_t operator[](const char* name) const {
    const auto found = constants.find(name);
    return found == constants.end() ? 0 : found->second;
  }
  // The type of an argument that is passed; nothing where it was left out when this was compiled
  std::string type(const char* name) const {
    for (const Argument& a : arguments)
      if (a.name == name) return a.type;
    return "";
  }
};

std::vector<std::string> words(const char* text) {
  std::vector<std::string> out;
  for (const char* end; *text; text = *end ? end + 1 : end) {
    end = strchr(text, ' ');
    if (!end) end = text + strlen(text);
    out.emplace_back(text, end);
  }
  return out;
}

const std::vector<Kernel>& all() {
  static const std::vector<Kernel> kernels = [] {
    std::vector<Kernel> out;
    for (int i = 0; i < CUBIN_COUNT; ++i) {
      Kernel k{&CUBINS[i], {}, {}};
      for (const std::string& w : words(CUBINS[i].constants))
        k.constants[w.substr(0, w.find('='))] = std::stoll(w.substr(w.find('=') + 1));
      for (const std::string& w : words(CUBINS[i].arguments))
        k.arguments.push_back({w.substr(0, w.find(':')), w.substr(w.find(':') + 1)});
      out.push_back(std::move(k));
    }
    return out;
  }();
  return kernels;
}

// A cubin runs on its own GPU and on later ones of the same major version; from sm_90 on Triton's code is
// architecture-specific (sm_90a) and runs on that one alone
bool runs_on(const Kernel& k, int sm) {
  return k.cubin->sm == sm || (k.cubin->sm < 90 && k.cubin->sm / 10 == sm / 10 && k.cubin->sm < sm);
}

// The best that fits: compiled for the nearest GPU, then with the least `cost`
template <class Fits, class Cost>
const Kernel& chosen(const char* name, const Device& device, const std::string& problem, Fits&& fits, Cost&& cost) {
  const Kernel* best = nullptr;
  for (const Kernel& k : all()) {
    if (strcmp(k.cubin->kernel, name) != 0 || !runs_on(k, device.sm) || !fits(k)) continue;
    if (!best || k.cubin->sm > best->cubin->sm || (k.cubin->sm == best->cubin->sm && cost(k) < cost(*best))) best = &k;
  }
  if (best) return *best;
  const std::string carried = CUBIN_COUNT ? "this library's " + std::to_string(CUBIN_COUNT) + " cubins have none for it"
                                          : "this library was built without cubins";
  throw std::runtime_error("ai.optimize: no CUDA kernel " + std::string(name) + " for sm_" + std::to_string(device.sm) +
                           ", " + problem + ": " + carried +
                           "; run the model without the library (its nodes carry their bodies), or build it with "
                           "OPTIMIZE_CUBINS, see kernels/native_cubins.py");
}

union Value {
  const void* pointer;
  int64_t whole;
  int32_t small;
  float real;
};

// The arguments by name, put in the order and the types of a kernel
struct Values {
  std::map<std::string, const void*> pointers;
  Numbers numbers;
  std::map<std::string, float> reals;

  Value of(const Argument& a) const {
    Value v{};
    if (a.type[0] == '*') {
      const auto found = pointers.find(a.name);
      if (found != pointers.end()) v.pointer = found->second;  // else a scratch pointer: null, no kernel uses it
      if ((uintptr_t)v.pointer % 16) throw std::runtime_error("ai.optimize: " + a.name + " is not aligned to 16 bytes");
    } else if (a.type == "fp32") {
      v.real = reals.at(a.name);
    } else if (a.type == "i64") {
      v.whole = numbers.at(a.name);
    } else {
      v.small = (int32_t)numbers.at(a.name);
    }
    return v;
  }
};

void run(const Device& device, const Kernel& kernel, int64_t grid, const Values& values, void* stream) {
  if (grid == 0) return;
  if (grid > 2147483647) throw std::runtime_error("ai.optimize: a grid of more than 2^31 - 1 blocks");
  std::vector<Value> held;
  for (const Argument& a : kernel.arguments) held.push_back(values.of(a));
  std::vector<void*> places;
  for (Value& v : held) places.push_back(&v);
  launch(device, *kernel.cubin, (unsigned)grid, places.data(), stream);
}

std::string pointer_type(bool half) { return half ? "*fp16" : "*fp32"; }
bool divides(int64_t unit, std::initializer_list<int64_t> numbers) {
  return std::all_of(numbers.begin(), numbers.end(), [unit](int64_t n) { return unit == 0 || n % unit == 0; });
}

std::string text(std::initializer_list<std::pair<const char*, int64_t>> numbers) {
  std::string out;
  for (const auto& [name, n] : numbers) out += (out.empty() ? "" : ", ") + std::string(name) + " " + std::to_string(n);
  return out;
}

}  // namespace

void attention_on_cuda(const AttentionProblem& p, bool half, void* stream) {
  if (p.batch * p.heads * p.queries * p.head_dim == 0) return;
  if (!(p.scale > 0)) throw std::runtime_error("ai.optimize: Attention on CUDA takes a scale above 0");
  const Device device = current_device();
  if (p.keys == 0 || (p.causal && p.queries > p.keys))
    throw std::runtime_error("ai.optimize: Attention on CUDA takes keys, and where it is causal no fewer than queries");
  const int64_t group = p.heads / p.kv_heads, row = p.head_dim, *b = p.bias_stride;
  const int64_t kind = p.bias_kind == BiasKind::none ? 0 : p.bias_kind == BiasKind::added ? 1 : 2;
  const bool one_row = kind && b[2] == 0 && (b[1] == 0 || group == 1), causal = p.causal && p.queries > 1;
  const auto fits = [&](const Kernel& k) {
    return k["HEAD"] == p.head_dim && k["CAUSAL"] == causal && k["KIND"] == kind &&
           (!k["ONE_ROW"] || one_row) && (!k["ONE_BLOCK"] || p.keys <= k["BLOCK_N"]) &&
           (!k["EVEN_KEYS"] || p.keys % k["BLOCK_N"] == 0) && divides(k["UNIT"], {row}) && k.type("q") == pointer_type(half) &&
           (!kind || k.type("bias") == (kind == 2 ? "*i1" : pointer_type(half)));
  };
  const auto cost = [&](const Kernel& k) {  // of all heads of a group; a block of few rows takes what one of 64 does
    const int64_t programs = k["PACK"] ? 1 : group, rows = p.queries * (k["PACK"] ? group : 1);
    const int64_t height = blocks(rows, k["BLOCK_M"]) * std::max<int64_t>(k["BLOCK_M"], 64);
    const int64_t padded = programs * height * blocks(p.keys, k["BLOCK_N"]) * k["BLOCK_N"];
    return 4 * padded - 2 * k["ONE_BLOCK"] - k["ONE_ROW"];
  };
  const Kernel& k = chosen("attention", device,
                           text({{"head_dim", p.head_dim}, {"group", group}, {"causal", causal}, {"bias", kind},
                                 {"keys", p.keys}, {"bits", half ? 16 : 32}}), fits, cost);
  const int64_t programs = k["PACK"] ? p.kv_heads : p.heads, rows = p.queries * (k["PACK"] ? group : 1);
  const int64_t row_blocks = blocks(rows, k["BLOCK_M"]);
  Values v;
  v.pointers = {{"q", p.q}, {"k", p.k}, {"v", p.v}, {"bias", p.bias}, {"out", p.out}};
  v.numbers = {{"programs", programs}, {"queries", p.queries}, {"keys", p.keys}, {"blocks", row_blocks}, {"GROUP", group},
               {"bias_batch", b[0]}, {"bias_head", b[1]}, {"bias_query", b[2]}, {"bias_key", b[3]}};
  const std::pair<const char*, const Strides&> strides[] = {
      {"q", p.q_strides}, {"out", p.q_strides}, {"k", p.kv_strides}, {"v", p.kv_strides}};
  for (const auto& [name, s] : strides) {
    v.numbers[std::string(name) + "_batch"] = s.batch;
    v.numbers[std::string(name) + "_head"] = s.head;
    v.numbers[std::string(name) + "_token"] = s.token;
  }
  v.reals = {{"scale", p.scale}};
  run(device, k, p.batch * programs * row_blocks, v, stream);
}

void norm_on_cuda(const NormProblem& p, bool half, void* stream) {
  if (p.rows * p.channels == 0) return;
  const Device device = current_device();
  const std::pair<const char*, PerToken> modulations[] = {{"gate", p.gate}, {"scale", p.scale}, {"shift", p.shift}};
  const char* const constants[] = {"GATE", "SCALE", "SHIFT"};
  const auto fits = [&](const Kernel& k) {
    for (int i = 0; i < 3; ++i) {  // 1: a row for each batch; 2: a row for each token, which may be the same
      const PerToken& m = modulations[i].second;
      if (!m.data != !k[constants[i]] || (k[constants[i]] == 1 && m.token_stride != 0)) return false;
    }
    return k["RMS"] == p.rms && k.type("x") == pointer_type(half) && !k.type("residual").empty() == !!p.residual &&
           !k.type("weight").empty() && !k.type("bias").empty() == !!p.bias && divides(k["UNIT"], {p.channels}) &&
           (k["LOOPED"] || p.channels <= k["BLOCK"]);
  };
  const auto cost = [](const Kernel& k) {  // rows held whole before rows walked twice, then rows per batch, then no padding
    return ((k["LOOPED"] * 8 + k["SCALE"] + k["GATE"]) << 32) + (k["BLOCK"] << 5) - k["UNIT"];
  };
  const Kernel& k = chosen("norm", device,
                           text({{"channels", p.channels}, {"rms", p.rms}, {"residual", !!p.residual}, {"gate", !!p.gate.data},
                                 {"modulated", !!p.scale.data}, {"bits", half ? 16 : 32}}), fits, cost);
  const int64_t batch = p.rows / p.tokens, per_batch = blocks(p.tokens, k["ROWS"]), whole = p.tokens * p.channels;
  Values v;
  v.pointers = {{"x", p.x}, {"residual", p.residual}, {"weight", p.weight}, {"bias", p.bias}, {"out", p.y}, {"total", p.total}};
  v.numbers = {{"tokens", p.tokens}, {"channels", p.channels}, {"blocks", batch * per_batch}, {"blocks_per_batch", per_batch},
               {"x_batch", whole}, {"x_token", p.channels}, {"residual_batch", whole}, {"residual_token", p.channels}};
  for (const auto& [name, m] : modulations) {
    v.pointers[name] = m.data;
    v.numbers[std::string(name) + "_batch"] = m.batch_stride;
    v.numbers[std::string(name) + "_token"] = m.token_stride;
  }
  v.reals = {{"eps", p.epsilon}};
  run(device, k, batch * per_batch, v, stream);
}

namespace {

// Two passes: means and squares of channels in chunks, merged per group, then every tile is normalized
void group_norm_in_chunks(const Device& device, const GroupNormProblem& p, bool half, const std::string& what, void* stream) {
  const auto fits = [&](const Kernel& k) {
    return k.type("x") == pointer_type(half) && !k["CHANNELS_LAST"] && divides(k["UNIT"], {p.spatial});
  };
  const auto wide = [](const Kernel& k) { return -k["UNIT"]; };
  const Kernel& partial = chosen("group_norm_partial", device, what, fits, wide);
  const Kernel& merge = chosen("group_norm_merge", device, what, [](const Kernel&) { return true; }, wide);
  const Kernel& apply = chosen("group_norm_apply", device, what, [&](const Kernel& k) {
    return fits(k) && k["SILU"] == p.silu && k["PARTS"] == 0 && !k.type("weight").empty() && !k.type("bias").empty();
  }, wide);
  const int64_t chunk = partial["TILES"] * partial["POSITIONS"], chunks = blocks(p.spatial, chunk);
  const int64_t parts = p.batch * chunks * p.channels;
  float* room = (float*)allocate_on(stream, (size_t)(2 * parts + 2 * p.batch * p.groups + 8) * sizeof(float));
  float *squares = room + (parts + 3) / 4 * 4, *statistics = squares + (parts + 3) / 4 * 4;
  Values v;
  v.pointers = {{"x", p.x}, {"weight", p.weight}, {"bias", p.bias}, {"out", p.y}, {"means", room}, {"squares", squares},
                {"statistics", statistics}};
  v.numbers = {{"channels", p.channels}, {"positions", p.spatial}, {"groups", p.groups}, {"chunks", chunks}, {"chunk", chunk},
               {"group_channels", p.channels / p.groups}, {"channel_blocks", blocks(p.channels, partial["CHANNELS"])}};
  v.reals = {{"eps", p.epsilon}};
  run(device, partial, p.batch * v.numbers["channel_blocks"] * chunks, v, stream);
  run(device, merge, p.batch * p.groups, v, stream);
  v.numbers["channel_blocks"] = blocks(p.channels, apply["CHANNELS"]);
  v.numbers["position_blocks"] = blocks(p.spatial, apply["POSITIONS"]);
  run(device, apply, p.batch * v.numbers["channel_blocks"] * v.numbers["position_blocks"], v, stream);
  free_on(stream, room);
}

}  // namespace

void group_norm_on_cuda(const GroupNormProblem& p, bool half, void* stream) {
  if (p.batch * p.channels * p.spatial == 0) return;
  const Device device = current_device();
  const int64_t channels = p.channels / p.groups;
  const std::string what = text({{"group", channels}, {"positions", p.spatial}, {"silu", p.silu}, {"bits", half ? 16 : 32}});
  const auto fits = [&](const Kernel& k) {
    return k.type("x") == pointer_type(half) && k["SILU"] == p.silu && !k["CHANNELS_LAST"] && !k.type("weight").empty() &&
           !k.type("bias").empty() && divides(k["UNIT"], {p.spatial}) && channels <= k["CHANNELS"] &&
           p.spatial <= k["POSITIONS"];
  };
  const bool whole = std::any_of(all().begin(), all().end(), [&](const Kernel& k) {
    return strcmp(k.cubin->kernel, "group_norm") == 0 && runs_on(k, device.sm) && fits(k);
  });
  if (!whole) return group_norm_in_chunks(device, p, half, what, stream);
  const Kernel& k = chosen("group_norm", device, what, fits, [](const Kernel& c) { return c["CHANNELS"] * c["POSITIONS"]; });
  Values v;
  v.pointers = {{"x", p.x}, {"weight", p.weight}, {"bias", p.bias}, {"out", p.y}};
  v.numbers = {{"groups", p.groups}, {"group_channels", channels}, {"positions", p.spatial}};
  v.reals = {{"eps", p.epsilon}};
  run(device, k, p.batch * p.groups, v, stream);
}

// The kernel writes [batch, tokens, heads, head_dim]; a node's result is [batch, heads, tokens, head_dim]. So each head
// is a batch of one head, and q and k are launched one after the other, each as the kernel's q.
void rope_on_cuda(const RopeProblem& p, bool half, void* stream) {
  const Device device = current_device();
  const bool normed = p.sides[0].weight != nullptr;
  const int64_t rotation = !p.cos ? 0 : p.interleaved ? 1 : 2, size = half ? 2 : 4, span = p.tokens * p.head_dim;
  const auto fits = [&](const Kernel& k) {
    return k.type("q") == pointer_type(half) && k["ROTATION"] == rotation && !k.type("q_weight").empty() == normed &&
           (!rotation || k.type("cos") == pointer_type(false)) && k["HEADS"] == 1 && p.head_dim <= k["BLOCK"] && divides(k["UNIT"], {p.head_dim});
  };
  const Kernel& k = chosen("qk_norm_rope", device,
                           text({{"head_dim", p.head_dim}, {"rotation", rotation}, {"normed", normed}, {"bits", half ? 16 : 32}}),
                           fits, [](const Kernel& c) { return (c["BLOCK"] << 5) - c["UNIT"]; });
  const int64_t token_blocks = blocks(p.tokens, k["TOKENS"]), steps = p.cos && p.angle_batch_stride ? p.batch : 1;
  for (const RopeSide& side : p.sides)
    for (int64_t step = 0; step < steps; ++step) {  // one for each batch where each has its angles
      const int64_t heads = p.batch / steps * side.heads, at = step * heads * span * size, angle = step * p.angle_batch_stride;
      const auto shifted = [](const void* x, int64_t bytes) { return x ? (const char*)x + bytes : nullptr; };
      Values v;
      v.pointers = {{"q", shifted(side.x, at)}, {"k", side.x}, {"q_out", shifted(side.y, at)}, {"k_out", side.y},
                    {"q_weight", side.weight}, {"k_weight", side.weight}, {"cos", p.cos ? p.cos + angle : p.cos},
                    {"sin", p.sin ? p.sin + angle : p.sin}};
      v.numbers = {{"tokens", p.tokens}, {"q_heads", 1}, {"k_heads", 1}, {"head_dim", p.head_dim},
                   {"token_blocks", token_blocks}, {"q_blocks", 1}, {"blocks", 1}, {"q_batch", span}, {"q_head", 0},
                   {"q_token", p.head_dim}, {"k_batch", span}, {"k_head", 0}, {"k_token", p.head_dim}, {"cos_batch", 0},
                   {"cos_token", p.head_dim / 2}, {"sin_batch", 0}, {"sin_token", p.head_dim / 2}};
      v.reals = {{"eps", p.epsilon}};
      run(device, k, heads * token_blocks, v, stream);
    }
}

void gated_on_cuda(const GatedProblem& p, bool half, void* stream) {
  if (p.count == 0) return;
  const Device device = current_device();
  const auto fits = [&](const Kernel& k) {
    return k.type("value") == pointer_type(half) && k["ACTIVATION"] == (int64_t)p.gate_kind && divides(k["UNIT"], {p.count});
  };
  const Kernel& k = chosen("gated", device, text({{"activation", (int64_t)p.gate_kind}, {"bits", half ? 16 : 32}}), fits,
                           [](const Kernel& c) { return c["ROWS"] * 32 - c["UNIT"]; });
  Values v;  // all in one row
  v.pointers = {{"value", p.value}, {"gate", p.gate}, {"out", p.y}};
  v.numbers = {{"rows", 1}, {"columns", p.count}, {"blocks", blocks(p.count, k["BLOCK"])}, {"value_row", 0}, {"gate_row", 0}};
  run(device, k, blocks(p.count, k["BLOCK"]), v, stream);
}

}  // namespace optimize
