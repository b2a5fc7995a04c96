// The mask of a dropout: ChaCha8 by counter, of which the thread of a block of 16 values makes that block, and the host (`random.rs`) makes
// them one after the other: the same bits. Source: Bernstein, "ChaCha, a variant of Salsa20", 2008; counter and stream of 64 bits as in
// the crate rand_chacha.

// The 256 bits of the key.
struct Key {
    unsigned int of[8];
};

static __device__ unsigned int turned(unsigned int x, int by) { return x << by | x >> (32 - by); }

#define QUARTER(a, b, c, d)                                                                                              \
    a += b, d = turned(d ^ a, 16), c += d, b = turned(b ^ c, 12), a += b, d = turned(d ^ a, 8), c += d, b = turned(b ^ c, 7)

static __device__ void chacha8(const Key &key, unsigned long long counter, unsigned int *out) {
    const unsigned int first[16] = {0x61707865u, 0x3320646eu, 0x79622d32u, 0x6b206574u, key.of[0], key.of[1], key.of[2], key.of[3],
                                    key.of[4],   key.of[5],   key.of[6],   key.of[7],   (unsigned int)counter, (unsigned int)(counter >> 32), 0u, 0u};
    unsigned int x[16];
    for (int i = 0; i < 16; i++) x[i] = first[i];
    for (int round = 0; round < 4; round++) {
        QUARTER(x[0], x[4], x[8], x[12]);
        QUARTER(x[1], x[5], x[9], x[13]);
        QUARTER(x[2], x[6], x[10], x[14]);
        QUARTER(x[3], x[7], x[11], x[15]);
        QUARTER(x[0], x[5], x[10], x[15]);
        QUARTER(x[1], x[6], x[11], x[12]);
        QUARTER(x[2], x[7], x[8], x[13]);
        QUARTER(x[3], x[4], x[9], x[14]);
    }
    for (int i = 0; i < 16; i++) out[i] = x[i] + first[i];
}

// Every value is 0 where its word is below `threshold`, else `kept`.
template <class Value>
static __device__ void fill(Value *mask, unsigned long long count, const Key &key, unsigned int threshold, Value kept) {
    const unsigned long long stride = (unsigned long long)gridDim.x * blockDim.x;
    const unsigned long long blocks = (count + 15) / 16;
    for (unsigned long long b = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x; b < blocks; b += stride) {
        unsigned int words[16];
        chacha8(key, b, words);
        for (int i = 0; i < 16; i++) {
            if (b * 16 + i < count) mask[b * 16 + i] = words[i] < threshold ? (Value)0 : kept;
        }
    }
}

extern "C" __global__ void dropout_f32(float *mask, unsigned long long count, Key key, unsigned int threshold, float kept) {
    fill(mask, count, key, threshold, kept);
}

// Values of bf16 as their bits.
extern "C" __global__ void dropout_bf16(unsigned short *mask, unsigned long long count, Key key, unsigned int threshold,
                                        unsigned short kept) {
    fill(mask, count, key, threshold, kept);
}
