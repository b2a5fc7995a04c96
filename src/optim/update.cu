// One update of a flat buffer in one pass over it: reads gradient, state and newest weights, writes the next weights and
// the state, publishes the version that steps use, and clears the gradient. The same operations in the same order as the
// rule's pass on the processor, so that both give the same bits for the same scale; compiled without contraction into
// multiply-add.
//
// A rule is a struct of its constants with `apply`, which changes one weight and its state; and an entry `update_NAME`, which
// takes them out of a list as long for every rule.

// The constants of every update. `mean` makes the mean of the sum of gradients; `clip` is 0 where nothing is clipped;
// versions are `horizon` updates like this one ahead of the weights.
struct Common {
    float mean, clip, keep, horizon;
};

// The constants of a rule, in the order of its struct.
struct Constants {
    float of[8];
};

// What every entry takes. `old` may be `updated`. The version that steps use is `published`, or `rounded` where it is bf16;
// both are null where it is `updated` itself. A buffer of state that the rule does not have is null. `norm` is that of the sum.
#define BUFFERS                                                                                                          \
    float *updated, const float *old, float *published, unsigned short *rounded, float *gradient, float *first,          \
        float *second, const unsigned char *decays, const float *norm, unsigned long long count, Common common

template <class Rule>
static __device__ void pass(BUFFERS, Rule rule) {
    const float length = *norm * common.mean;
    // Neither inf nor NaN.
    const bool finite = (__float_as_uint(length) & 0x7f800000u) != 0x7f800000u;
    float scale = common.mean;
    if (common.clip > 0.0f) {
        const float factor = common.clip / (length + 1e-6f);
        if (factor < 1.0f) scale *= factor;
    }

    const unsigned long long stride = (unsigned long long)gridDim.x * blockDim.x;
    for (unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
        const float before = old[i];
        float weight = before;
        if (finite) {
            if (decays[i]) weight *= common.keep;
            weight = rule.apply(weight, gradient[i] * scale, first, second, i);
        }
        updated[i] = weight;
        float version = weight;
        if (finite && common.horizon != 0.0f) version = weight + common.horizon * (weight - before);
        if (published) published[i] = version;
        if (rounded) rounded[i] = bf16(version);
        gradient[i] = 0.0f;
    }
}

struct Adamw {
    float beta1, beta2, lead, step, root, eps;

    __device__ float apply(float weight, float g, float *first, float *second, unsigned long long i) const {
        const float m = beta1 * first[i] + (1.0f - beta1) * g;
        const float v = beta2 * second[i] + (1.0f - beta2) * g * g;
        first[i] = m;
        second[i] = v;
        const float u = lead == 1.0f ? m : lead * m + (1.0f - lead) * g;
        return weight - step * u / (sqrtf(v) / root + eps);
    }
};

struct Sgd {
    float momentum, lr;

    __device__ float apply(float weight, float g, float *first, float *, unsigned long long i) const {
        const float m = momentum * first[i] + g;
        first[i] = m;
        return weight - lr * m;
    }
};

#define ARGUMENTS updated, old, published, rounded, gradient, first, second, decays, norm, count, common

extern "C" __global__ void update_adamw(BUFFERS, Constants c) {
    pass(ARGUMENTS, Adamw{c.of[0], c.of[1], c.of[2], c.of[3], c.of[4], c.of[5]});
}

extern "C" __global__ void update_sgd(BUFFERS, Constants c) { pass(ARGUMENTS, Sgd{c.of[0], c.of[1]}); }
