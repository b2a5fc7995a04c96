// The sum of a slice over the members of a group, in their order, in f32: what the member that owns the slice makes of its own values,
// in place, and of those that the others have sent it, one after the other. The order is that of the oracle, so the bits are.

static __device__ float wide(float value) { return value; }

static __device__ void narrow(float sum, float *out) { *out = sum; }
static __device__ void narrow(float sum, unsigned short *out) { *out = bf16(sum); }

template <class Value>
static __device__ void sum(Value *own, const Value *others, unsigned int me, unsigned int members, unsigned long long count) {
    const unsigned long long stride = (unsigned long long)gridDim.x * blockDim.x;
    for (unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
        float total = 0.0f;
        for (unsigned int member = 0; member < members; member++) {
            const Value value = member == me ? own[i] : others[(member - (member > me)) * count + i];
            total = member == 0 ? wide(value) : total + wide(value);
        }
        narrow(total, own + i);
    }
}

extern "C" __global__ void sum_f32(float *own, const float *others, unsigned int me, unsigned int members,
                                   unsigned long long count) {
    sum(own, others, me, members, count);
}

extern "C" __global__ void sum_bf16(unsigned short *own, const unsigned short *others, unsigned int me, unsigned int members,
                                    unsigned long long count) {
    sum(own, others, me, members, count);
}
