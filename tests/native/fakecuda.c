/* Stands where libcuda.so.1 is looked for and prints what it is asked to launch: a test of the packing of arguments, of
 * nothing else. The sizes of the parameters are read from the cubin itself (its .nv.info section). FAKE_SM says what GPU
 * it pretends to be. */
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 96, KPARAM_INFO = 0x17, SUCCESS = 0, NOT_FOUND = 500 };

typedef struct {
  char entry[128];
  uint64_t digest; /* FNV-1a of the cubin */
  int count, shared;
  unsigned size[MOST];
} Function;

int cuInit(unsigned flags) { return (int)flags; }
int cuGetErrorName(int result, const char **name) {
  *name = result == NOT_FOUND ? "CUDA_ERROR_NOT_FOUND" : "CUDA_ERROR";
  return SUCCESS;
}
int cuCtxGetCurrent(void **context) {
  *context = (void *)0x1000;
  return SUCCESS;
}
int cuCtxGetDevice(int *device) { return *device = 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  const int sm = atoi(getenv("FAKE_SM"));
  *value = device + (attribute == 75 ? sm / 10 : sm % 10);
  return SUCCESS;
}
int cuModuleLoadData(void **module, const void *image) {
  *module = (void *)image;
  return memcmp(image, ELFMAG, 4) ? 200 : SUCCESS;
}

int cuModuleGetFunction(void **function, void *module, const char *entry) {
  const char *image = module;
  const Elf64_Ehdr *elf = module;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + elf->e_shoff);
  const char *names = image + sections[elf->e_shstrndx].sh_offset;
  char wanted[160];
  snprintf(wanted, sizeof wanted, ".nv.info.%s", entry);
  for (int i = 0; i < elf->e_shnum; ++i) {
    if (strcmp(names + sections[i].sh_name, wanted)) continue;
    Function *f = calloc(1, sizeof *f);
    snprintf(f->entry, sizeof f->entry, "%s", entry);
    f->digest = 0xcbf29ce484222325u;
    for (size_t b = 0; b < elf->e_shoff + (size_t)elf->e_shnum * elf->e_shentsize; ++b)
      f->digest = (f->digest ^ (unsigned char)image[b]) * 0x100000001b3u;
    const unsigned char *at = (const unsigned char *)image + sections[i].sh_offset, *end = at + sections[i].sh_size;
    while (at < end) { /* format, attribute, and a 16-bit value or length of what follows */
      uint16_t value, ordinal;
      uint32_t packed;
      memcpy(&value, at + 2, 2);
      if (at[0] == 4 && at[1] == KPARAM_INFO) {
        memcpy(&ordinal, at + 8, 2);
        memcpy(&packed, at + 12, 4);
        f->size[ordinal] = packed >> 18;
        if (ordinal >= f->count) f->count = ordinal + 1;
      }
      at += 4 + (at[0] == 4 ? value : 0);
    }
    *function = f;
    return SUCCESS;
  }
  return NOT_FOUND;
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
  if (attribute == 8) ((Function *)function)->shared = value;
  return SUCCESS;
}

int cuLaunchKernel(void *function, unsigned grid, unsigned y, unsigned z, unsigned block, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **values, void **extra) {
  const Function *f = function;
  if (y * z * by * bz != 1 || extra) return 1;
  printf("launch %s cubin %llx grid %u block %u shared %u allowed %d stream %p:", f->entry,
         (unsigned long long)f->digest, grid, block, shared, f->shared, stream);
  for (int i = 0; i < f->count; ++i) {
    uint64_t value = 0;
    memcpy(&value, values[i], f->size[i]);
    printf(" %u:%llx", f->size[i], (unsigned long long)value);
  }
  printf("\n");
  return SUCCESS;
}

int cuMemAllocAsync(uint64_t *memory, size_t bytes, void *stream) {
  *memory = 0xabc000;
  printf("allocate %zu stream %p\n", bytes, stream);
  return SUCCESS;
}
int cuMemFreeAsync(uint64_t memory, void *stream) {
  printf("free %llx stream %p\n", (unsigned long long)memory, stream);
  return SUCCESS;
}
