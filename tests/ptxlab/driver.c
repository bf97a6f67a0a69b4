/* A stand-in for libcuda.so.1: Triton's own NVIDIA driver and launcher run against it with no GPU.
 *
 * It counts launches. With a callback set, it hands each launch to it: the function's handle, the grid, the threads of
 * a CTA, the shared memory, and the addresses of the parameters. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

#define EXPORT CUresult CUDAAPI

typedef int (*LaunchCallback)(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned threads,
                              unsigned shared_bytes, void **parameters);

static int compute_capability = 90;
static LaunchCallback callback;
static uint64_t launch_count;
static char error_text[800] = "stand-in driver"; /* Triton appends it to a prefix, in a buffer of 1024 */
static CUcontext current_context = (CUcontext)1;

/* ---- For driver.py ---- */

void standin_configure(int capability, LaunchCallback on_launch)
{
    compute_capability = capability;
    callback = on_launch;
}

uint64_t standin_launches(void)
{
    return __atomic_load_n(&launch_count, __ATOMIC_RELAXED);
}

void standin_set_error(const char *text)
{
    strncpy(error_text, text, sizeof error_text - 1);
}

/* ---- The device ---- */

static int largest_shared_memory(void)
{
    switch (compute_capability) {
    case 75:
        return 64 << 10;
    case 80:
    case 87:
        return 163 << 10;
    case 86:
    case 89:
    case 120:
        return 99 << 10;
    default:
        return 227 << 10;
    }
}

EXPORT cuInit(unsigned flags)
{
    return CUDA_SUCCESS;
}

EXPORT cuDriverGetVersion(int *version)
{
    *version = 13000;
    return CUDA_SUCCESS;
}

EXPORT cuDeviceGetCount(int *count)
{
    *count = 1;
    return CUDA_SUCCESS;
}

EXPORT cuDeviceGet(CUdevice *device, int ordinal)
{
    *device = ordinal;
    return CUDA_SUCCESS;
}

EXPORT cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device)
{
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
        *value = compute_capability / 10;
        break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
        *value = compute_capability % 10;
        break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
        *value = largest_shared_memory();
        break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
        *value = largest_shared_memory() + (1 << 10);
        break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK:
        *value = 48 << 10;
        break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
        *value = 132;
        break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
        *value = 32;
        break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR:
        *value = 65536;
        break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR:
        *value = 2048;
        break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
        *value = 1024;
        break;
    default:
        *value = 1;
    }
    return CUDA_SUCCESS;
}

/* ---- Contexts, streams, errors ---- */

EXPORT cuCtxGetCurrent(CUcontext *context)
{
    *context = current_context;
    return CUDA_SUCCESS;
}

EXPORT cuCtxSetCurrent(CUcontext context)
{
    current_context = context;
    return CUDA_SUCCESS;
}

EXPORT cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device)
{
    *context = (CUcontext)1;
    return CUDA_SUCCESS;
}

EXPORT cuCtxGetDevice(CUdevice *device)
{
    *device = 0;
    return CUDA_SUCCESS;
}

EXPORT cuCtxGetLimit(size_t *value, CUlimit limit)
{
    *value = 0;
    return CUDA_SUCCESS;
}

EXPORT cuCtxSetLimit(CUlimit limit, size_t value)
{
    return CUDA_SUCCESS;
}

EXPORT cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status)
{
    *status = CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
}

EXPORT cuGetErrorString(CUresult error, const char **text)
{
    *text = error_text;
    return CUDA_SUCCESS;
}

/* ---- Modules and functions: a function's handle is an address of its own, never freed, so that it stays unique ---- */

EXPORT cuModuleLoadData(CUmodule *module, const void *image)
{
    *module = malloc(1);
    return CUDA_SUCCESS;
}

EXPORT cuModuleUnload(CUmodule module)
{
    return CUDA_SUCCESS;
}

EXPORT cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name)
{
    *function = malloc(1);
    return CUDA_SUCCESS;
}

EXPORT cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function)
{
    switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
        *value = 1024;
        break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS:
        *value = 32;
        break;
    default:
        *value = 0;
    }
    return CUDA_SUCCESS;
}

EXPORT cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value)
{
    return CUDA_SUCCESS;
}

EXPORT cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config)
{
    return CUDA_SUCCESS;
}

EXPORT cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config)
{
    *clusters = 1;
    return CUDA_SUCCESS;
}

/* ---- Memory: host memory serves as device memory ---- */

EXPORT cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer)
{
    *(CUdeviceptr *)value = pointer;
    return CUDA_SUCCESS;
}

EXPORT cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                              const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                              const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                              CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                              CUtensorMapFloatOOBfill fill)
{
    return CUDA_ERROR_NOT_SUPPORTED;
}

/* ---- Launches ---- */

EXPORT cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                      unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream, void **parameters,
                      void **extra)
{
    __atomic_fetch_add(&launch_count, 1, __ATOMIC_RELAXED);
    if (callback && callback(function, grid_x, grid_y, grid_z, block_x, shared_bytes, parameters))
        return CUDA_ERROR_LAUNCH_FAILED;
    return CUDA_SUCCESS;
}

EXPORT cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra)
{
    return cuLaunchKernel(function, config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX,
                          config->blockDimY, config->blockDimZ, config->sharedMemBytes, config->hStream, parameters,
                          extra);
}
