// A gradient of bf16 added to the f32 sum of a step: the same operation as the processor's, and the same bits. A thread takes eight
// values at a time, as many as a load of sixteen bytes has; both buffers must begin at a multiple of that.

struct alignas(16) Eight {
    unsigned short of[8];
};

struct alignas(16) Four {
    float of[4];
};

extern "C" __global__ void add_bf16(float *sum, const unsigned short *part, unsigned long long count) {
    const unsigned long long first = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
    const unsigned long long stride = (unsigned long long)gridDim.x * blockDim.x;
    const unsigned long long eights = count / 8;
    for (unsigned long long i = first; i < eights; i += stride) {
        const Eight eight = ((const Eight *)part)[i];
        Four *const into = (Four *)sum + 2 * i;
        Four low = into[0], high = into[1];
        for (int j = 0; j < 4; j++) {
            low.of[j] += wide(eight.of[j]);
            high.of[j] += wide(eight.of[j + 4]);
        }
        into[0] = low;
        into[1] = high;
    }
    for (unsigned long long i = eights * 8 + first; i < count; i += stride) sum[i] += wide(part[i]);
}
