// One update of a flat buffer in one pass over it: reads gradient, moments and newest weights, writes the next version and
// the moments, and clears the gradient. The same operations in the same order as optim/host.rs, so that both give the same
// bits for the same scale; compiled without contraction into multiply-add.

#define SGD 1

// The constants of one update. `mean` makes the mean of the sum of gradients; `clip` is 0 where nothing is clipped.
struct Rule {
    float mean, clip, keep, beta1, beta2, step, root, eps;
    int kind;
};

// The nearest bf16, ties to even; what is not a number stays so.
static __device__ unsigned short bf16(float value) {
    unsigned int bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
    return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// `old` may be `updated`. `rounded` is null where versions are f32, `second` for SGD. `norm` is that of the sum.
extern "C" __global__ void update(float *updated, const float *old, unsigned short *rounded, float *gradient, float *first,
                                  float *second, const unsigned char *decays, const float *norm, unsigned long long count,
                                  Rule rule) {
    const float length = *norm * rule.mean;
    // Neither inf nor NaN.
    const bool finite = (__float_as_uint(length) & 0x7f800000u) != 0x7f800000u;
    float scale = rule.mean;
    if (rule.clip > 0.0f) {
        const float factor = rule.clip / (length + 1e-6f);
        if (factor < 1.0f) scale *= factor;
    }
    const unsigned long long stride = (unsigned long long)gridDim.x * blockDim.x;
    for (unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
        float weight = old[i];
        if (finite) {
            if (decays[i]) weight *= rule.keep;
            const float g = gradient[i] * scale;
            if (rule.kind == SGD) {
                const float m = rule.beta1 * first[i] + g;
                first[i] = m;
                weight -= rule.step * m;
            } else {
                const float m = rule.beta1 * first[i] + (1.0f - rule.beta1) * g;
                const float v = rule.beta2 * second[i] + (1.0f - rule.beta2) * g * g;
                first[i] = m;
                second[i] = v;
                weight -= rule.step * m / (sqrtf(v) / rule.root + rule.eps);
            }
        }
        updated[i] = weight;
        if (rounded) rounded[i] = bf16(weight);
        gradient[i] = 0.0f;
    }
}
