// The kernels of one instruction set. Compiled once for each, with its flags and OPTIMIZE_ISA, its name.
#include "attention.h"
#include "group_norm.h"

#define NAME_(isa) kernels_##isa
#define NAME(isa) NAME_(isa)
#define TEXT_(isa) #isa
#define TEXT(isa) TEXT_(isa)

namespace optimize {

extern const Kernels NAME(OPTIMIZE_ISA) = {
    TEXT(OPTIMIZE_ISA),
    {attention<float>, attention<Half>},
    {norm<float>, norm<Half>},
    {group_norm<float>, group_norm<Half>},
    {rope<float>, rope<Half>},
    {gated<float>, gated<Half>},
};

}  // namespace optimize
