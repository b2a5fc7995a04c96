// bf16 by its bits, for the kernels of every file: this one stands before each.

static __device__ float wide(unsigned short bits) { return __uint_as_float((unsigned int)bits << 16); }

// The nearest bf16, ties to even; what is not a number stays so.
static __device__ unsigned short bf16(float value) {
    const unsigned int bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
    return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
