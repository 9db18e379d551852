// The CUDA driver, opened when it is first needed: nothing of CUDA is needed to build or to load the library.
#pragma once

#include <stddef.h>

namespace optimize {

struct Device {
  void* context;
  int sm;  // 90
};

// The device of the current context. All throw std::runtime_error with the driver's name of the error.
Device current_device();

struct Cubin;
// `values` point to the arguments, in order. The module is loaded once for each context.
void launch(const Device&, const Cubin&, unsigned grid, void** values, void* stream);

// Memory of the stream: freed when the work before it is done
void* allocate_on(void* stream, size_t bytes);
void free_on(void* stream, void* memory);

}  // namespace optimize
