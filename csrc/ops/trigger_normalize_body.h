// The arithmetic of trigger_normalize, once, for the CPU and CUDA; see trigger_normalize.h.
#pragma once

#include "core/dtype.h"
#include "core/host_device.h"
#include "core/philox.h"
#include "ops/trigger_normalize.h"

namespace pybackdoor {

// 1/255 in two floats: fma(x, kHi, x * kLo) is x / 255 rounded once for every level x (tested).
constexpr float kInv255Hi = 0x1.010102p-8f;
constexpr float kInv255Lo = -0x1.fdfdfep-33f;
constexpr uint32_t kStreamDecisions = 0, kStreamNoise = 1;
constexpr int kChunk = 16;  // pixels of one thread: three 16 B loads of NHWC bytes

PB_HD float level_value(uint32_t x) {
#ifdef __CUDA_ARCH__
  const float v = static_cast<float>(x);
  return __fmaf_rn(v, kInv255Hi, __fmul_rn(v, kInv255Lo));
#else
  return static_cast<float>(static_cast<int32_t>(x)) / 255.f;
#endif
}

// Truncate and wrap modulo 256. From 2^31 on every float is a multiple of 256, hence the 0.
PB_HD uint8_t quantize(float v, bool clip) {
  if (clip) v = clamp(v, 0.f, 1.f);
  const float scaled = mul_rn(v, 255.f);
  const bool small = std::fabs(scaled) < 0x1p31f;
  return static_cast<uint8_t>(static_cast<int32_t>(small ? scaled : 0.f) & 255);
}

PB_HD float normalize_value(float v, float mean, float std) {
  return div_rn(add_rn(v, -mean), std);
}

struct BlendRule {
  double strength;
  float a, b;  // without a mask
  bool nonzero_only, additive, clip;
};

PB_HD BlendRule blend_rule(const TriggerNormalizeArgs& args, double strength) {
  const float b = args.additive ? 1.f : static_cast<float>(1.0 - strength);
  return BlendRule{strength, static_cast<float>(strength), b, args.nonzero_only, args.additive,
                   args.clip};
}

PB_HD uint8_t blend_weighted(uint8_t x, float t, float a, float b, const BlendRule& rule) {
  const float mixed = add_rn(mul_rn(a, t), mul_rn(b, level_value(x)));
  const uint8_t q = quantize(mixed, rule.clip);
  return rule.nonzero_only && t == 0.f ? x : q;
}

PB_HD uint8_t blend_masked(uint8_t x, float t, float m, const BlendRule& rule) {
  const double weight = mul_rn(rule.strength, static_cast<double>(m));
  const float b = rule.additive ? 1.f : static_cast<float>(add_rn(1.0, -weight));
  return blend_weighted(x, t, static_cast<float>(weight), b, rule);
}

// Bilinear weights of one grid point, as grid_sample(align_corners=True, padding "zeros").
struct Corners {
  int32_t x, y;     // west, north; the others are one further
  float weight[4];  // nw, ne, sw, se; 0 outside the image
};

PB_HD Corners warp_corners(float gx, float gy, int64_t height, int64_t width) {
  // Beyond one pixel outside nothing is seen: the clamp keeps the conversion to int defined.
  const float half_x = mul_rn(static_cast<float>(width - 1), 0.5f);
  const float half_y = mul_rn(static_cast<float>(height - 1), 0.5f);
  const float x = clamp(mul_rn(add_rn(gx, 1.f), half_x), -2.f, static_cast<float>(width + 1));
  const float y = clamp(mul_rn(add_rn(gy, 1.f), half_y), -2.f, static_cast<float>(height + 1));
  const float west = std::floor(x), north = std::floor(y);
  const float w = add_rn(x, -west), e = add_rn(1.f, -w);
  const float n = add_rn(y, -north), s = add_rn(1.f, -n);
  Corners c;
  c.x = static_cast<int32_t>(west);
  c.y = static_cast<int32_t>(north);
  const bool x0 = c.x >= 0 && c.x < width, x1 = c.x >= -1 && c.x + 1 < width;
  const bool y0 = c.y >= 0 && c.y < height, y1 = c.y >= -1 && c.y + 1 < height;
  c.weight[0] = x0 && y0 ? mul_rn(s, e) : 0.f;
  c.weight[1] = x1 && y0 ? mul_rn(s, w) : 0.f;
  c.weight[2] = x0 && y1 ? mul_rn(n, e) : 0.f;
  c.weight[3] = x1 && y1 ? mul_rn(n, w) : 0.f;
  return c;
}

PB_HD float warp_mix(const uint8_t v[4], const float weight[4]) {
  float sum = mul_rn(level_value(v[0]), weight[0]);
  sum = add_rn(sum, mul_rn(level_value(v[1]), weight[1]));
  sum = add_rn(sum, mul_rn(level_value(v[2]), weight[2]));
  return add_rn(sum, mul_rn(level_value(v[3]), weight[3]));
}

// ln(u) for normal u in (0, 1]; Cephes logf, relative error below 2e-7.
PB_HD float log_unit(float u) {
  const uint32_t bits = float_bits(u);
  // Shift by 1/sqrt(2), so that the mantissa m lies in [1/sqrt(2), sqrt(2)).
  const int32_t e = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;
  const float m = bits_float(bits - (static_cast<uint32_t>(e) << 23));
  const float x = add_rn(m, -1.f), z = mul_rn(x, x), k = static_cast<float>(e);
  float p = 7.0376836292e-2f;
  p = add_rn(mul_rn(p, x), -1.1514610310e-1f);
  p = add_rn(mul_rn(p, x), 1.1676998740e-1f);
  p = add_rn(mul_rn(p, x), -1.2420140846e-1f);
  p = add_rn(mul_rn(p, x), 1.4249322787e-1f);
  p = add_rn(mul_rn(p, x), -1.6668057665e-1f);
  p = add_rn(mul_rn(p, x), 2.0000714765e-1f);
  p = add_rn(mul_rn(p, x), -2.4999993993e-1f);
  p = add_rn(mul_rn(p, x), 3.3333331174e-1f);
  float y = mul_rn(mul_rn(p, x), z);
  y = add_rn(y, mul_rn(k, -2.12194440e-4f));  // ln 2 in two parts, the larger of few bits
  y = add_rn(y, mul_rn(z, -0.5f));
  return add_rn(add_rn(x, y), mul_rn(k, 0.693359375f));
}

// Two standard normals from two words (Box-Muller): see reference.noise_normals.
PB_HD void normal_pair(uint32_t w0, uint32_t w1, float* n0, float* n1) {
  const float u = mul_rn(static_cast<float>(static_cast<int32_t>((w0 >> 8) + 1)), 0x1p-24f);
  const float radius = sqrt_rn(mul_rn(log_unit(u), -2.f));
  const int32_t turn = static_cast<int32_t>(w1 >> 8);                 // 2^24 to the full turn
  const int32_t quadrant = (turn + (1 << 21)) >> 22;                  // nearest quarter, 0..4
  const int32_t rest = turn - (quadrant << 22);                       // in [-2^21, 2^21)
  const float r = mul_rn(static_cast<float>(rest), 0x1.921fb6p-22f);  // times (pi / 2) / 2^22
  const float z = mul_rn(r, r);
  float s = add_rn(mul_rn(z, -1.9515295891e-4f), 8.3321608736e-3f);
  s = add_rn(mul_rn(s, z), -1.6666654611e-1f);
  s = add_rn(mul_rn(mul_rn(s, z), r), r);
  float c = add_rn(mul_rn(z, 2.443315711809948e-5f), -1.388731625493765e-3f);
  c = add_rn(mul_rn(c, z), 4.166664568298827e-2f);
  c = add_rn(add_rn(mul_rn(mul_rn(c, z), z), mul_rn(z, -0.5f)), 1.f);
  const bool swap = quadrant & 1;
  const float cosine = swap ? s : c, sine = swap ? c : s;
  const bool minus_cosine = (quadrant + 1) & 2, minus_sine = quadrant & 2;
  *n0 = mul_rn(radius, minus_cosine ? -cosine : cosine);
  *n1 = mul_rn(radius, minus_sine ? -sine : sine);
}

PB_HD float add_noise(float v, float normal, float noise_std, bool half) {
  float d = mul_rn(normal, noise_std);
  if (half) d = clamp(d, 0.f, 1.f);
  return clamp(add_rn(v, d), 0.f, 1.f);
}

// What happens to one image.
struct SamplePlan {
  bool triggered, noisy;
  int32_t trigger;
  int32_t y, x;  // window's top left
  BlendRule rule;
  int32_t erase_y, erase_x, erase_side;  // side 0: none
  uint32_t id_low, id_high;
};

PB_HD SamplePlan sample_plan(const TriggerNormalizeArgs& args, int64_t b) {
  SamplePlan plan = {};
  if (args.mode != Mode::kNone) {
    plan.trigger = args.trigger_id ? args.trigger_id[b] : 0;
    plan.triggered = plan.trigger >= 0 && plan.trigger < args.num_triggers;
    plan.y = args.position ? args.position[2 * b] : 0;
    plan.x = args.position ? args.position[2 * b + 1] : 0;
    plan.rule = blend_rule(args, args.strength ? args.strength[b] : args.strength_value);
  }
  if (!args.augment) return plan;
  const uint64_t id = static_cast<uint64_t>(args.sample_id[b]);
  plan.id_low = static_cast<uint32_t>(id);
  plan.id_high = static_cast<uint32_t>(id >> 32);
  const uint32_t stream = kStreamDecisions | args.view << 8;
  const Words first = philox(Words{{0, stream, plan.id_low, plan.id_high}}, args.seed);
  const Words second = philox(Words{{1, stream, plan.id_low, plan.id_high}}, args.seed);
  plan.noisy = mul_rn(static_cast<double>(first.w[0]), 0x1p-32) < args.noise_p;
  if (!(mul_rn(static_cast<double>(first.w[1]), 0x1p-32) < args.erase_p)) return plan;
  const double share = add_rn(mul_rn(mul_rn(static_cast<double>(first.w[2]), 0x1p-32),
                                     add_rn(args.erase_high, -args.erase_low)),
                              args.erase_low);
  const double area = mul_rn(share, static_cast<double>(args.height * args.width));
  const int64_t nearest = static_cast<int64_t>(add_rn(std::sqrt(area), 0.5));
  const int64_t side = max_of(1, min_of(nearest, min_of(args.height, args.width)));
  plan.erase_side = static_cast<int32_t>(side);
  plan.erase_y =
      static_cast<int32_t>(first.w[3] * static_cast<uint64_t>(args.height - side + 1) >> 32);
  plan.erase_x =
      static_cast<int32_t>(second.w[0] * static_cast<uint64_t>(args.width - side + 1) >> 32);
  return plan;
}

// A chunk: up to 16 pixels in a row-major run of image b, channel by channel.
struct Chunk {
  int64_t image;  // b
  int64_t pixel;  // first, multiple of 16
  int32_t y, x;   // of the first
  int32_t count;  // 1..16
};

PB_HD void load_chunk(const TriggerNormalizeArgs& args, const Chunk& chunk, uint8_t (&q)[3][16]) {
  const int64_t plane = args.height * args.width;
  if (args.input_layout == InputLayout::kNhwc) {
    const uint8_t* p = args.images + (chunk.image * plane + chunk.pixel) * 3;
    if (chunk.count == 16 && aligned16(p)) {
      const Vec16 v[3] = {load16(p), load16(p + 16), load16(p + 32)};
      PB_UNROLL
      for (int k = 0; k < 48; ++k) {
        q[k % 3][k / 3] = static_cast<uint8_t>(v[k / 16].w[k / 4 % 4] >> (k % 4 * 8));
      }
    } else {
      PB_UNROLL
      for (int k = 0; k < 48; ++k) q[k % 3][k / 3] = k / 3 < chunk.count ? p[k] : 0;
    }
    return;
  }
  PB_UNROLL
  for (int c = 0; c < 3; ++c) {
    const uint8_t* p = args.images + (chunk.image * 3 + c) * plane + chunk.pixel;
    if (chunk.count == 16 && aligned16(p)) {
      const Vec16 v = load16(p);
      PB_UNROLL
      for (int i = 0; i < 16; ++i) q[c][i] = static_cast<uint8_t>(v.w[i / 4] >> (i % 4 * 8));
    } else {
      PB_UNROLL
      for (int i = 0; i < 16; ++i) q[c][i] = i < chunk.count ? p[i] : 0;
    }
  }
}

PB_HD void store_poisoned(const TriggerNormalizeArgs& args, const Chunk& chunk,
                          const uint8_t (&q)[3][16]) {
  const int64_t plane = args.height * args.width;
  if (args.input_layout == InputLayout::kNhwc) {
    uint8_t* p = args.poisoned + (chunk.image * plane + chunk.pixel) * 3;
    if (chunk.count == 16 && aligned16(p)) {
      PB_UNROLL
      for (int part = 0; part < 3; ++part) {
        Vec16 v = {{0, 0, 0, 0}};
        PB_UNROLL
        for (int k = 0; k < 16; ++k) {
          const int e = part * 16 + k;
          v.w[k / 4] |= static_cast<uint32_t>(q[e % 3][e / 3]) << (k % 4 * 8);
        }
        store16(p + part * 16, v);
      }
    } else {
      PB_UNROLL
      for (int k = 0; k < 48; ++k) {
        if (k / 3 < chunk.count) p[k] = q[k % 3][k / 3];
      }
    }
    return;
  }
  PB_UNROLL
  for (int c = 0; c < 3; ++c) {
    uint8_t* p = args.poisoned + (chunk.image * 3 + c) * plane + chunk.pixel;
    PB_UNROLL
    for (int i = 0; i < 16; ++i) {
      if (i < chunk.count) p[i] = q[c][i];
    }
  }
}

PB_HD void warp_chunk(const TriggerNormalizeArgs& args, const SamplePlan& plan, const Chunk& chunk,
                      uint8_t (&q)[3][16]) {
  const int64_t plane = args.height * args.width;
  const uint8_t* image = args.images + chunk.image * plane * 3;
  const int64_t step = args.input_layout == InputLayout::kNhwc ? 3 : 1;
  const int64_t channel = args.input_layout == InputLayout::kNhwc ? 1 : plane;
  const float* grid = args.grid + (plan.trigger * plane + chunk.pixel) * 2;
  PB_UNROLL
  for (int i = 0; i < 16; ++i) {
    if (i >= chunk.count) continue;
    const Corners at = warp_corners(grid[2 * i], grid[2 * i + 1], args.height, args.width);
    // Indices are clamped into the image: where that moves them the weight is 0.
    const int64_t x0 = max_of(0, min_of(at.x, args.width - 1)) * step;
    const int64_t x1 = max_of(0, min_of(at.x + 1, args.width - 1)) * step;
    const int64_t y0 = max_of(0, min_of(at.y, args.height - 1)) * args.width * step;
    const int64_t y1 = max_of(0, min_of(at.y + 1, args.height - 1)) * args.width * step;
    PB_UNROLL
    for (int c = 0; c < 3; ++c) {
      const uint8_t* p = image + c * channel;
      const uint8_t v[4] = {p[y0 + x0], p[y0 + x1], p[y1 + x0], p[y1 + x1]};
      q[c][i] = quantize(warp_mix(v, at.weight), args.clip);
    }
  }
}

PB_HD void window_chunk(const TriggerNormalizeArgs& args, const SamplePlan& plan,
                        const Chunk& chunk, uint8_t (&q)[3][16]) {
  const int64_t area = args.window_height * args.window_width;
  const float* pattern = args.pattern + plan.trigger * 3 * area;
  const bool whole = args.window_height == args.height && args.window_width == args.width &&
                     plan.y == 0 && plan.x == 0 && chunk.count == 16;
  uint32_t inside = 0;
  int64_t at[16];
  int64_t y = chunk.y - plan.y, x = chunk.x - plan.x;
  PB_UNROLL
  for (int i = 0; i < 16; ++i) {
    const bool in =
        i < chunk.count && y >= 0 && y < args.window_height && x >= 0 && x < args.window_width;
    inside |= static_cast<uint32_t>(in) << i;
    at[i] = in ? y * args.window_width + x : 0;
    if (++x == args.width - plan.x) {
      x = -plan.x;
      ++y;
    }
  }
  if (!inside) return;
  PB_UNROLL
  for (int c = 0; c < 3; ++c) {
    float t[16];
    if (whole && aligned16(pattern + c * area + chunk.pixel)) {
      PB_UNROLL
      for (int i = 0; i < 16; i += 4) {
        const Vec16 v = load16(pattern + c * area + chunk.pixel + i);
        PB_UNROLL
        for (int k = 0; k < 4; ++k) t[i + k] = bits_float(v.w[k]);
      }
    } else {
      PB_UNROLL
      for (int i = 0; i < 16; ++i) t[i] = pattern[c * area + at[i]];
    }
    if (args.mode == Mode::kPatch) {
      PB_UNROLL
      for (int i = 0; i < 16; ++i) {
        if (inside >> i & 1) q[c][i] = quantize(t[i], args.clip);
      }
    } else if (args.mask == nullptr) {
      PB_UNROLL
      for (int i = 0; i < 16; ++i) {
        const uint8_t v = blend_weighted(q[c][i], t[i], plan.rule.a, plan.rule.b, plan.rule);
        if (inside >> i & 1) q[c][i] = v;
      }
    } else {
      const int64_t plane = plan.trigger * args.mask_channels + (args.mask_channels == 3 ? c : 0);
      PB_UNROLL
      for (int i = 0; i < 16; ++i) {
        const uint8_t v = blend_masked(q[c][i], t[i], args.mask[plane * area + at[i]], plan.rule);
        if (inside >> i & 1) q[c][i] = v;
      }
    }
  }
}

// Where element i of channel c of the chunk goes, in a planar layout (nchw or patchified).
PB_HD int64_t planar_offset(const TriggerNormalizeArgs& args, const Chunk& chunk, int c, int i) {
  const int64_t plane = args.height * args.width;
  if (args.layout == Layout::kNchw) return (chunk.image * 3 + c) * plane + chunk.pixel + i;
  const int64_t p = args.patch_size;
  const int64_t y = (chunk.pixel + i) / args.width, x = (chunk.pixel + i) % args.width;
  const int64_t patch = y / p * (args.width / p) + x / p;
  return chunk.image * 3 * plane + (patch * 3 + c) * p * p + y % p * p + x % p;
}

template <DType dtype, int n>
PB_HD void store_run(void* out, int64_t offset, const float (&v)[n]) {  // n elements, 16 B aligned
  constexpr int per_vector = dtype == DType::kFloat32 ? 4 : 8;
  char* p = static_cast<char*>(out) + offset * (16 / per_vector);
  PB_UNROLL
  for (int i = 0; i < n; i += per_vector) {
    Vec16 word;
    PB_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (dtype == DType::kFloat32) {
        word.w[k] = float_bits(v[i + k]);
      } else {
        const uint32_t low = to_half_bits<dtype>(v[i + 2 * k % per_vector]);
        const uint32_t high = to_half_bits<dtype>(v[i + (2 * k + 1) % per_vector]);
        word.w[k] = low | high << 16;
      }
    }
    store16(p + i * (16 / per_vector), word);
  }
}

template <DType dtype>
PB_HD void store_one(void* out, int64_t offset, float v) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(out)[offset] = v;
  } else {
    static_cast<uint16_t*>(out)[offset] = to_half_bits<dtype>(v);
  }
}

struct Four {
  float v[4];
};

// Four neighbouring pixels of one channel with their noise, normalised. Not inlined on the device:
// a copy for each of a chunk's twelve blocks made compilation take minutes.
#ifdef __CUDACC__
static __host__ __device__ __noinline__
#else
static inline
#endif
    Four noisy_four(uint32_t levels, uint32_t block, uint32_t stream_view, uint32_t id_low,
                    uint32_t id_high, uint64_t seed, float noise_std, bool half, float mean,
                    float std) {
  const Words words = philox(Words{{block, stream_view, id_low, id_high}}, seed);
  Four normal;
  normal_pair(words.w[0], words.w[1], &normal.v[0], &normal.v[1]);
  normal_pair(words.w[2], words.w[3], &normal.v[2], &normal.v[3]);
  PB_UNROLL
  for (int k = 0; k < 4; ++k) {
    const float x = level_value(levels >> (8 * k) & 255u);
    normal.v[k] = normalize_value(add_noise(x, normal.v[k], noise_std, half), mean, std);
  }
  return normal;
}

template <DType dtype, bool channels_last>
PB_HD void store_chunk(const TriggerNormalizeArgs& args, const SamplePlan& plan, const Chunk& chunk,
                       const float* table, const uint8_t (&q)[3][16]) {
  constexpr int64_t size = dtype == DType::kFloat32 ? 4 : 2;
  const int64_t plane = args.height * args.width;
  uint32_t erased = 0;
  if (plan.erase_side) {
    int64_t y = chunk.y - plan.erase_y, x = chunk.x - plan.erase_x;
    PB_UNROLL
    for (int i = 0; i < 16; ++i) {
      const bool in = y >= 0 && y < plan.erase_side && x >= 0 && x < plan.erase_side;
      erased |= static_cast<uint32_t>(in) << i;
      if (++x == args.width - plan.erase_x) {
        x = -plan.erase_x;
        ++y;
      }
    }
  }
  const uint32_t blocks = static_cast<uint32_t>((plane + 3) / 4);  // Philox blocks of a channel
  float all[48];                                                   // of channels_last
  PB_UNROLL
  for (int c = 0; c < 3; ++c) {
    float v[16];
    if (plan.noisy) {
      PB_UNROLL
      for (int block = 0; block < 4; ++block) {
        uint32_t levels = 0;
        PB_UNROLL
        for (int k = 0; k < 4; ++k) {
          levels |= static_cast<uint32_t>(q[c][4 * block + k]) << (8 * k);
        }
        const uint32_t at = static_cast<uint32_t>(c) * blocks +
                            static_cast<uint32_t>(chunk.pixel / 4) + static_cast<uint32_t>(block);
        const Four four =
            noisy_four(levels, at, kStreamNoise | args.view << 8, plan.id_low, plan.id_high,
                       args.seed, args.noise_std, args.half_noise, args.mean[c], args.std[c]);
        PB_UNROLL
        for (int k = 0; k < 4; ++k) v[4 * block + k] = four.v[k];
      }
    } else {
      PB_UNROLL
      for (int i = 0; i < 16; ++i) v[i] = table[c * 256 + q[c][i]];
    }
    PB_UNROLL
    for (int i = 0; i < 16; ++i) {
      if (erased >> i & 1) v[i] = 0.f;
      if (channels_last) all[3 * i + c] = v[i];
    }
    if (channels_last) continue;
    const int64_t first = planar_offset(args, chunk, c, 0);
    const bool run =
        chunk.count == 16 && (args.layout == Layout::kNchw || args.patch_size % 16 == 0);
    if (run && aligned16(static_cast<char*>(args.out) + first * size)) {
      store_run<dtype>(args.out, first, v);
    } else {
      PB_UNROLL
      for (int i = 0; i < 16; ++i) {
        if (i < chunk.count) store_one<dtype>(args.out, planar_offset(args, chunk, c, i), v[i]);
      }
    }
  }
  if (!channels_last) return;
  const int64_t first = (chunk.image * plane + chunk.pixel) * 3;
  if (chunk.count == 16 && aligned16(static_cast<char*>(args.out) + first * size)) {
    store_run<dtype>(args.out, first, all);
  } else {
    PB_UNROLL
    for (int k = 0; k < 48; ++k) {
      if (k / 3 < chunk.count) store_one<dtype>(args.out, first + k, all[k]);
    }
  }
}

// All chunks of image b that belong to `lane`; table: [3, 256] normalised values of the levels.
template <DType dtype, bool channels_last>
PB_HD void trigger_normalize_body(const TriggerNormalizeArgs& args, const SamplePlan& plan,
                                  const float* table, int64_t b, int64_t lane, int64_t lanes) {
  const int64_t pixels = args.height * args.width;
  for (int64_t pixel = lane * kChunk; pixel < pixels; pixel += lanes * kChunk) {
    Chunk chunk;
    chunk.image = b;
    chunk.pixel = pixel;
    chunk.y = static_cast<int32_t>(pixel / args.width);
    chunk.x = static_cast<int32_t>(pixel - chunk.y * args.width);
    chunk.count = static_cast<int32_t>(min_of(kChunk, pixels - pixel));
    uint8_t q[3][16];
    if (plan.triggered && args.mode == Mode::kWarp) {
      warp_chunk(args, plan, chunk, q);
    } else {
      load_chunk(args, chunk, q);
      if (plan.triggered) window_chunk(args, plan, chunk, q);
    }
    if (args.poisoned) store_poisoned(args, chunk, q);
    store_chunk<dtype, channels_last>(args, plan, chunk, table, q);
  }
}

}  // namespace pybackdoor
