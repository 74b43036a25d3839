/* A CUDA driver that knows one GPU of compute capability 9 and does nothing: tests/kernels/entered.py looks through it
   at what launches hand over. A map of a tensor holds what it was made from. */

#include <stdint.h>
#include <string.h>

#define NOTHING(name, ...) int name(__VA_ARGS__) { return 0; }
#define GIVES(name, type, value, ...) int name(type *found, ##__VA_ARGS__) { *found = value; return 0; }

static uintptr_t handles = 1 << 12;
static void (*seen)(const void *config, void *function, void **arguments);

void no_driver_tell(void *whom) { seen = whom; }

NOTHING(cuInit, unsigned flags)
NOTHING(cuCtxSetCurrent, void *context)
NOTHING(cuCtxSetLimit, int limit, size_t value)
NOTHING(cuFuncSetAttribute, void *function, int attribute, int value)
NOTHING(cuFuncSetCacheConfig, void *function, int config)
NOTHING(cuModuleUnload, void *module)
NOTHING(cuPointerGetAttributes, unsigned count, int *attributes, void **data, uint64_t address)
NOTHING(cuTensorMapEncodeIm2col, void *map)
GIVES(cuCtxGetCurrent, void *, (void *)8)
GIVES(cuCtxGetDevice, int, 0)
GIVES(cuCtxGetLimit, size_t, 1 << 20, int limit)
GIVES(cuDeviceGet, int, 0, int ordinal)
GIVES(cuDeviceGetAttribute, int, 232448, int attribute, int device)
GIVES(cuDeviceGetCount, int, 1)
GIVES(cuDevicePrimaryCtxRetain, void *, (void *)8, int device)
GIVES(cuDriverGetVersion, int, 13000)
GIVES(cuFuncGetAttribute, int, attribute ? 0 : 1024, int attribute, void *function)
GIVES(cuModuleGetFunction, void *, (void *)(handles += 16), void *module, const char *name)
GIVES(cuModuleLoadData, void *, (void *)(handles += 16), const void *image)
GIVES(cuOccupancyMaxActiveClusters, int, 1, void *function, const void *config)
GIVES(cuStreamIsCapturing, int, 0, void *stream)

int cuGetErrorString(int error, const char **text) { *text = "no driver"; return 0; }
int cuPointerGetAttribute(uint64_t *found, int attribute, uint64_t address) { *found = address; return 0; }

int cuTensorMapEncodeTiled(uint64_t *map, int type, unsigned rank, void *address, const uint64_t *sizes,
                           const uint64_t *strides, const unsigned *box, const unsigned *steps, int interleave,
                           int swizzle, int promotion, int fill) {
    memset(map, 0, 128);
    map[0] = (uint64_t)address;
    map[1] = type | rank << 8 | swizzle << 16 | interleave << 24 | (uint64_t)promotion << 32 | (uint64_t)fill << 40;
    for (unsigned i = 0; i < rank; i++) {
        map[2 + i] = sizes[i];
        map[7 + i] = box[i] | (uint64_t)steps[i] << 32;
        if (i + 1 < rank) map[12 + i] = strides[i];
    }
    return 0;
}

int cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra) {
    if (seen) seen(config, function, arguments);
    return 0;
}
