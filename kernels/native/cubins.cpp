// The table of embedded cubins: what `python -m optimize.kernels.native_cubins` wrote, or nothing.
#include "cuda.h"

#if OPTIMIZE_HAVE_CUBINS
#define CUBIN(symbol, ...) extern "C" const unsigned char symbol##_begin[], symbol##_end[];
#include "cubins.inc"
#undef CUBIN
#endif

namespace optimize {

const Cubin CUBINS[] = {
#if OPTIMIZE_HAVE_CUBINS
#define CUBIN(symbol, kernel, entry, arguments, constants, sm, shared, warps) \
  {kernel, entry, arguments, constants, sm, shared, warps, symbol##_begin, symbol##_end},
#include "cubins.inc"
#undef CUBIN
#endif
    {nullptr, nullptr, nullptr, nullptr, 0, 0, 0, nullptr, nullptr},
};
const int CUBIN_COUNT = (int)(sizeof CUBINS / sizeof *CUBINS) - 1;

}  // namespace optimize
