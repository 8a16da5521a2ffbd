// The arithmetic of trigger_normalize, once, for the CPU and CUDA; see trigger_normalize.h.
#pragma once

#include "core/dtype.h"
#include "core/host_device.h"
#include "core/normal.h"
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

// The weights of the pattern and of the image where the mask is m.
PB_HD void masked_weights(float m, const BlendRule& rule, float* a, float* b) {
  const double weight = mul_rn(rule.strength, static_cast<double>(m));
  *a = static_cast<float>(weight);
  *b = rule.additive ? 1.f : static_cast<float>(add_rn(1.0, -weight));
}

PB_HD float mixed_value(uint8_t x, float t, float a, float b) {
  return add_rn(mul_rn(a, t), mul_rn(b, level_value(x)));
}

PB_HD uint8_t blend_weighted(uint8_t x, float t, float a, float b, const BlendRule& rule) {
  const uint8_t q = quantize(mixed_value(x, t, a, b), rule.clip);
  return rule.nonzero_only && t == 0.f ? x : q;
}

PB_HD uint8_t blend_masked(uint8_t x, float t, float m, const BlendRule& rule) {
  float a, b;
  masked_weights(m, rule, &a, &b);
  return blend_weighted(x, t, a, b, rule);
}

// What a patch or blend gives before it is quantised; m null: no mask.
PB_HD float window_value(Mode mode, uint8_t x, float t, const float* m, const BlendRule& rule) {
  float value = t;
  if (mode == Mode::kBlend) {
    float a = rule.a, b = rule.b;
    if (m) masked_weights(*m, rule, &a, &b);
    value = rule.nonzero_only && t == 0.f ? level_value(x) : mixed_value(x, t, a, b);
  }
  return rule.clip ? clamp(value, 0.f, 1.f) : value;
}

// Bilinear weights of one grid point, as grid_sample(align_corners=True, padding "zeros").
struct Corners {
  int32_t x, y;     // west, north; the others are one further
  float weight[4];  // nw, ne, sw, se; 0 outside the image
};

// Free of branches, so that the CPU's loops vectorise.
PB_HD Corners warp_corners(float gx, float gy, int32_t height, int32_t width) {
  // Beyond one pixel outside nothing is seen: the clamp keeps the conversion to int defined.
  const float half_x = mul_rn(static_cast<float>(width - 1), 0.5f);
  const float half_y = mul_rn(static_cast<float>(height - 1), 0.5f);
  const float x = clamp(mul_rn(add_rn(gx, 1.f), half_x), -2.f, static_cast<float>(width + 1));
  const float y = clamp(mul_rn(add_rn(gy, 1.f), half_y), -2.f, static_cast<float>(height + 1));
  const int32_t cut_x = static_cast<int32_t>(x), cut_y = static_cast<int32_t>(y);
  Corners c;  // rounded down: cut, less 1 where cutting rounded up
  c.x = cut_x - (static_cast<float>(cut_x) > x ? 1 : 0);
  c.y = cut_y - (static_cast<float>(cut_y) > y ? 1 : 0);
  const float w = add_rn(x, -static_cast<float>(c.x)), e = add_rn(1.f, -w);
  const float n = add_rn(y, -static_cast<float>(c.y)), s = add_rn(1.f, -n);
  // An outside row or column has the weight 0, as all products with it then have.
  const float e0 = ((c.x >= 0) & (c.x < width)) ? e : 0.f;
  const float w1 = ((c.x >= -1) & (c.x < width - 1)) ? w : 0.f;
  const float s0 = ((c.y >= 0) & (c.y < height)) ? s : 0.f;
  const float n1 = ((c.y >= -1) & (c.y < height - 1)) ? n : 0.f;
  c.weight[0] = mul_rn(s0, e0);
  c.weight[1] = mul_rn(s0, w1);
  c.weight[2] = mul_rn(n1, e0);
  c.weight[3] = mul_rn(n1, w1);
  return c;
}

// Into [0, size).
PB_HD int32_t clamp_index(int32_t i, int32_t size) { return i < 0 ? 0 : i < size ? i : size - 1; }

// Levels nw, ne, sw, se and their weights -> value.
PB_HD float warp_mix(uint8_t v0, uint8_t v1, uint8_t v2, uint8_t v3, float w0, float w1, float w2,
                     float w3) {
  float sum = mul_rn(level_value(v0), w0);
  sum = add_rn(sum, mul_rn(level_value(v1), w1));
  sum = add_rn(sum, mul_rn(level_value(v2), w2));
  return add_rn(sum, mul_rn(level_value(v3), w3));
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
    // A window that misses the image: positions beyond it would overflow later on.
    if (args.mode != Mode::kWarp) {
      plan.triggered &= plan.y > -args.window_height && plan.y < args.height &&
                        plan.x > -args.window_width && plan.x < args.width;
    }
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

// A chunk: up to 16 pixels in a row-major run of one image.
struct Chunk {
  int64_t image;  // b
  int32_t pixel;  // first, multiple of 16
  int32_t y, x;   // of the first
  int32_t count;  // 1..16
};

// Its levels, four to a word: word 4 * c + i / 4 holds pixel i of channel c. The loops over
// channels are not unrolled, for the code's size; registers cannot be indexed, so `rotate` brings
// the next channel to the front, and after three turns all is as before.
struct Levels {
  uint32_t w[12];
};

PB_HD void rotate(Levels* q) {
  PB_UNROLL
  for (int k = 0; k < 4; ++k) {
    const uint32_t front = q->w[k];
    q->w[k] = q->w[4 + k];
    q->w[4 + k] = q->w[8 + k];
    q->w[8 + k] = front;
  }
}

PB_HD uint32_t byte_of(uint32_t word, int k) { return word >> (8 * k) & 255u; }

PB_HD uint32_t with_byte(uint32_t word, int k, uint32_t value) {
  return (word & ~(255u << (8 * k))) | value << (8 * k);
}

PB_HD int64_t first_byte(const TriggerNormalizeArgs& args, const Chunk& chunk, int c) {
  const int64_t plane = args.height * args.width;
  if (args.input_layout == InputLayout::kNhwc) return (chunk.image * plane + chunk.pixel) * 3;
  return (chunk.image * 3 + c) * plane + chunk.pixel;
}

PB_HD Levels load_chunk(const TriggerNormalizeArgs& args, const Chunk& chunk) {
  Levels q = {};
  if (args.input_layout == InputLayout::kNhwc) {
    const uint8_t* p = args.images + first_byte(args, chunk, 0);
    uint32_t raw[12] = {};
    if (chunk.count == 16 && aligned16(p)) {
      PB_UNROLL
      for (int part = 0; part < 3; ++part) {
        const Vec16 v = load16(p + 16 * part);
        PB_UNROLL
        for (int k = 0; k < 4; ++k) raw[4 * part + k] = v.w[k];
      }
    } else {
      PB_UNROLL
      for (int e = 0; e < 48; ++e) {
        if (e / 3 < chunk.count) raw[e / 4] |= static_cast<uint32_t>(p[e]) << (e % 4 * 8);
      }
    }
    PB_UNROLL
    for (int e = 0; e < 48; ++e) {
      const int c = e % 3, i = e / 3;
      q.w[4 * c + i / 4] |= byte_of(raw[e / 4], e % 4) << (i % 4 * 8);
    }
    return q;
  }
  PB_UNROLL
  for (int c = 0; c < 3; ++c) {
    const uint8_t* p = args.images + first_byte(args, chunk, c);
    if (chunk.count == 16 && aligned16(p)) {
      const Vec16 v = load16(p);
      PB_UNROLL
      for (int k = 0; k < 4; ++k) q.w[4 * c + k] = v.w[k];
    } else {
      PB_UNROLL
      for (int i = 0; i < 16; ++i) {
        if (i < chunk.count) q.w[4 * c + i / 4] |= static_cast<uint32_t>(p[i]) << (i % 4 * 8);
      }
    }
  }
  return q;
}

PB_HD void store_poisoned(const TriggerNormalizeArgs& args, const Chunk& chunk, const Levels& q) {
  if (args.input_layout == InputLayout::kNhwc) {
    uint8_t* p = args.poisoned + first_byte(args, chunk, 0);
    uint32_t raw[12] = {};
    PB_UNROLL
    for (int e = 0; e < 48; ++e) {
      const int c = e % 3, i = e / 3;
      raw[e / 4] |= byte_of(q.w[4 * c + i / 4], i % 4) << (e % 4 * 8);
    }
    if (chunk.count == 16 && aligned16(p)) {
      PB_UNROLL
      for (int k = 0; k < 12; k += 4) {
        store16(p + 4 * k, Vec16{{raw[k], raw[k + 1], raw[k + 2], raw[k + 3]}});
      }
    } else {
      PB_UNROLL
      for (int e = 0; e < 48; ++e) {
        if (e / 3 < chunk.count) p[e] = static_cast<uint8_t>(byte_of(raw[e / 4], e % 4));
      }
    }
    return;
  }
  PB_UNROLL
  for (int c = 0; c < 3; ++c) {
    uint8_t* p = args.poisoned + first_byte(args, chunk, c);
    const uint32_t* w = q.w + 4 * c;
    if (chunk.count == 16 && aligned16(p)) {
      store16(p, Vec16{{w[0], w[1], w[2], w[3]}});
    } else {
      PB_UNROLL
      for (int i = 0; i < 16; ++i) {
        if (i < chunk.count) p[i] = static_cast<uint8_t>(byte_of(w[i / 4], i % 4));
      }
    }
  }
}

PB_HD uint32_t warp_pixel(const TriggerNormalizeArgs& args, const uint8_t* image,
                          const float* grid) {  // -> the three levels in one word
  const bool nhwc = args.input_layout == InputLayout::kNhwc;
  const int32_t step = nhwc ? 3 : 1;
  const int64_t channel = nhwc ? 1 : args.height * args.width;
  const int32_t width = static_cast<int32_t>(args.width);
  const int32_t height = static_cast<int32_t>(args.height);
  const Corners at = warp_corners(grid[0], grid[1], height, width);
  // Indices are clamped into the image: where that moves them the weight is 0.
  const int32_t x0 = clamp_index(at.x, width) * step, x1 = clamp_index(at.x + 1, width) * step;
  const int32_t pitch = width * step;
  const int32_t y0 = clamp_index(at.y, height) * pitch, y1 = clamp_index(at.y + 1, height) * pitch;
  uint32_t levels = 0;
  PB_UNROLL
  for (int c = 0; c < 3; ++c) {
    const uint8_t* p = image + c * channel;
    const float value = warp_mix(p[y0 + x0], p[y0 + x1], p[y1 + x0], p[y1 + x1], at.weight[0],
                                 at.weight[1], at.weight[2], at.weight[3]);
    levels |= static_cast<uint32_t>(quantize(value, args.clip)) << (8 * c);
  }
  return levels;
}

PB_HD Levels warp_chunk(const TriggerNormalizeArgs& args, const SamplePlan& plan,
                        const Chunk& chunk) {
  const int64_t plane = args.height * args.width;
  const uint8_t* image = args.images + chunk.image * plane * 3;
  const float* grid = args.grid + (plan.trigger * plane + chunk.pixel) * 2;
  Levels q = {};
  PB_ROLLED
  for (int i = 0; i < chunk.count; ++i) {
    const uint32_t pixel = warp_pixel(args, image, grid + 2 * i);
    PB_UNROLL
    for (int c = 0; c < 3; ++c) {
      PB_UNROLL
      for (int k = 0; k < 4; ++k) {
        q.w[4 * c + k] |= (k == i / 4 ? byte_of(pixel, c) : 0u) << (i % 4 * 8);
      }
    }
  }
  return q;
}

// Bit i: pixel i of the chunk lies in the rectangle.
PB_HD uint32_t pixels_inside(const TriggerNormalizeArgs& args, const Chunk& chunk, int32_t y,
                             int32_t x, int32_t h, int32_t w) {
  int32_t row = chunk.y - y, col = chunk.x - x;
  const int32_t end = static_cast<int32_t>(args.width) - x;
  uint32_t inside = 0;
  PB_UNROLL
  for (int i = 0; i < 16; ++i) {
    const bool in = row >= 0 && row < h && col >= 0 && col < w;
    inside |= static_cast<uint32_t>(in) << i;
    if (++col == end) {
      col = -x;
      ++row;
    }
  }
  return inside & ((1u << chunk.count) - 1);
}

// The trigger on the front channel of q, c. t, m: that channel of the pattern and the mask.
PB_HD void window_channel(const TriggerNormalizeArgs& args, const SamplePlan& plan,
                          const Chunk& chunk, uint32_t inside, const float* t, const float* m,
                          Levels* q) {
  const int32_t width = static_cast<int32_t>(args.width);
  const int32_t pitch = static_cast<int32_t>(args.window_width);
  const bool dense = inside == 0xFFFFu && pitch == width;  // then 16 neighbours in the pattern
  int32_t row = chunk.y - plan.y, col = chunk.x - plan.x;
  const int32_t first = row * pitch + col;
  const bool vectors = dense && aligned16(t + first) && (m == nullptr || aligned16(m + first));
  PB_UNROLL
  for (int word = 0; word < 4; ++word) {
    float tv[4], mv[4] = {1.f, 1.f, 1.f, 1.f};
    if (vectors) {
      const Vec16 v = load16(t + first + 4 * word);
      const Vec16 u = m ? load16(m + first + 4 * word) : v;
      PB_UNROLL
      for (int k = 0; k < 4; ++k) {
        tv[k] = bits_float(v.w[k]);
        mv[k] = bits_float(u.w[k]);
      }
    } else {
      PB_UNROLL
      for (int k = 0; k < 4; ++k) {
        const int32_t at = inside >> (4 * word + k) & 1 ? row * pitch + col : 0;
        tv[k] = t[at];
        if (m) mv[k] = m[at];
        if (++col == width - plan.x) {
          col = -plan.x;
          ++row;
        }
      }
    }
    uint32_t levels = q->w[word];
    PB_UNROLL
    for (int k = 0; k < 4; ++k) {
      const uint8_t x = static_cast<uint8_t>(byte_of(levels, k));
      uint8_t v;
      if (args.mode == Mode::kPatch) {
        v = quantize(tv[k], args.clip);
      } else if (m == nullptr) {
        v = blend_weighted(x, tv[k], plan.rule.a, plan.rule.b, plan.rule);
      } else {
        v = blend_masked(x, tv[k], mv[k], plan.rule);
      }
      if (inside >> (4 * word + k) & 1) levels = with_byte(levels, k, v);
    }
    q->w[word] = levels;
  }
}

PB_HD void window_chunk(const TriggerNormalizeArgs& args, const SamplePlan& plan,
                        const Chunk& chunk, Levels* q) {
  const int32_t h = static_cast<int32_t>(args.window_height);
  const int32_t w = static_cast<int32_t>(args.window_width);
  const uint32_t inside = pixels_inside(args, chunk, plan.y, plan.x, h, w);
  if (!inside) return;
  const int64_t area = args.window_height * args.window_width;
  const float* t = args.pattern + int64_t{plan.trigger} * 3 * area;
  const float* m =
      args.mask ? args.mask + int64_t{plan.trigger} * args.mask_channels * area : nullptr;
  PB_ROLLED
  for (int c = 0; c < 3; ++c) {
    window_channel(args, plan, chunk, inside, t, m, q);
    rotate(q);
    t += area;
    if (m && args.mask_channels == 3) m += area;
  }
}

// Where pixel i, channel c of the chunk goes, in elements.
PB_HD int64_t out_offset(const TriggerNormalizeArgs& args, const Chunk& chunk, int c, int i) {
  const int64_t plane = args.height * args.width;
  const int32_t pixel = chunk.pixel + i;
  if (args.layout == Layout::kNchw) return (chunk.image * 3 + c) * plane + pixel;
  if (args.layout == Layout::kChannelsLast) return (chunk.image * plane + pixel) * 3 + c;
  const int32_t p = args.patch_size, width = static_cast<int32_t>(args.width);
  const int32_t y = pixel / width, x = pixel - y * width;
  const int64_t patch = static_cast<int64_t>(y / p) * (width / p) + x / p;
  return chunk.image * 3 * plane + (patch * 3 + c) * p * p + y % p * p + x % p;
}

template <DType dtype>
PB_HD void store_run(void* out, int64_t offset, const float (&v)[16]) {  // 16 B aligned
  constexpr int per_vector = dtype == DType::kFloat32 ? 4 : 8;
  char* p = static_cast<char*>(out) + offset * (16 / per_vector);
  PB_UNROLL
  for (int i = 0; i < 16; i += per_vector) {
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

// Pixels 4 * block .. + 3 of channel c of a noisy image, normalised.
PB_HD void noisy_four(const TriggerNormalizeArgs& args, const SamplePlan& plan, const Chunk& chunk,
                      int c, int block, uint32_t levels, float (&v)[4]) {
  const int64_t blocks = (args.height * args.width + 3) / 4;  // Philox blocks of a channel
  const uint32_t at = static_cast<uint32_t>(c * blocks + chunk.pixel / 4 + block);
  const Words words =
      philox(Words{{at, kStreamNoise | args.view << 8, plan.id_low, plan.id_high}}, args.seed);
  float normal[4];
  normal_pair(words.w[0], words.w[1], &normal[0], &normal[1]);
  normal_pair(words.w[2], words.w[3], &normal[2], &normal[3]);
  PB_UNROLL
  for (int k = 0; k < 4; ++k) {
    const float x =
        add_noise(level_value(byte_of(levels, k)), normal[k], args.noise_std, args.half_noise);
    v[k] = normalize_value(x, args.mean[c], args.std[c]);
  }
}

template <DType dtype>
PB_HD void store_noisy(const TriggerNormalizeArgs& args, const SamplePlan& plan, const Chunk& chunk,
                       uint32_t erased, Levels q) {
  PB_ROLLED
  for (int c = 0; c < 3; ++c) {
    PB_ROLLED
    for (int block = 0; block < 4; ++block) {
      float v[4];
      noisy_four(args, plan, chunk, c, block, q.w[0], v);
      PB_UNROLL
      for (int k = 0; k < 4; ++k) {
        const int i = 4 * block + k;
        if (erased >> i & 1) v[k] = 0.f;
        if (i < chunk.count) store_one<dtype>(args.out, out_offset(args, chunk, c, i), v[k]);
      }
      PB_UNROLL  // one word further
          for (int k = 0; k < 11; ++k) q.w[k] = q.w[k + 1];
    }
  }
}

template <DType dtype>
PB_HD void store_chunk(const TriggerNormalizeArgs& args, const SamplePlan& plan, const Chunk& chunk,
                       const float* table, Levels q) {
  const uint32_t erased = plan.erase_side ? pixels_inside(args, chunk, plan.erase_y, plan.erase_x,
                                                          plan.erase_side, plan.erase_side)
                                          : 0;
  if (plan.noisy) return store_noisy<dtype>(args, plan, chunk, erased, q);
  constexpr int64_t size = dtype == DType::kFloat32 ? 4 : 2;
  if (args.layout == Layout::kChannelsLast) {
    const int64_t first = out_offset(args, chunk, 0, 0);
    const bool run = chunk.count == 16 && aligned16(static_cast<char*>(args.out) + first * size);
    PB_UNROLL
    for (int part = 0; part < 48; part += 16) {
      float v[16];
      PB_UNROLL
      for (int k = 0; k < 16; ++k) {
        const int c = (part + k) % 3, i = (part + k) / 3;
        v[k] = table[c * 256 + byte_of(q.w[4 * c + i / 4], i % 4)];
        if (erased >> i & 1) v[k] = 0.f;
      }
      if (run) {
        store_run<dtype>(args.out, first + part, v);
      } else {
        PB_UNROLL
        for (int k = 0; k < 16; ++k) {
          if ((part + k) / 3 < chunk.count) store_one<dtype>(args.out, first + part + k, v[k]);
        }
      }
    }
    return;
  }
  const bool whole =
      chunk.count == 16 && (args.layout == Layout::kNchw || args.patch_size % 16 == 0);
  PB_ROLLED
  for (int c = 0; c < 3; ++c) {
    float v[16];
    PB_UNROLL
    for (int i = 0; i < 16; ++i) {
      v[i] = table[c * 256 + byte_of(q.w[i / 4], i % 4)];
      if (erased >> i & 1) v[i] = 0.f;
    }
    const int64_t first = out_offset(args, chunk, c, 0);
    if (whole && aligned16(static_cast<char*>(args.out) + first * size)) {
      store_run<dtype>(args.out, first, v);
    } else {
      PB_UNROLL
      for (int i = 0; i < 16; ++i) {
        if (i < chunk.count) store_one<dtype>(args.out, out_offset(args, chunk, c, i), v[i]);
      }
    }
    rotate(&q);
  }
}

// The same without quantisation: within the window the values are float, and the rest levels.
template <DType dtype>
PB_HD void store_float_chunk(const TriggerNormalizeArgs& args, const SamplePlan& plan,
                             const Chunk& chunk, const float* table, Levels q) {
  const int32_t h = static_cast<int32_t>(args.window_height);
  const int32_t w = static_cast<int32_t>(args.window_width);
  const uint32_t erased = plan.erase_side ? pixels_inside(args, chunk, plan.erase_y, plan.erase_x,
                                                          plan.erase_side, plan.erase_side)
                                          : 0;
  const uint32_t inside =
      plan.triggered ? pixels_inside(args, chunk, plan.y, plan.x, h, w) & ~erased : 0;
  const int64_t area = args.window_height * args.window_width;
  const float* t = args.pattern + int64_t{plan.trigger} * 3 * area;
  const float* m =
      args.mask ? args.mask + int64_t{plan.trigger} * args.mask_channels * area : nullptr;
  constexpr int64_t size = dtype == DType::kFloat32 ? 4 : 2;
  PB_ROLLED
  for (int c = 0; c < 3; ++c) {
    float v[16];
    int32_t row = chunk.y - plan.y, col = chunk.x - plan.x;
    PB_UNROLL
    for (int i = 0; i < 16; ++i) {
      const uint8_t x = static_cast<uint8_t>(byte_of(q.w[i / 4], i % 4));
      v[i] = erased >> i & 1 ? 0.f : table[c * 256 + x];
      if (inside >> i & 1) {
        const int32_t at = row * w + col;
        const float value = window_value(args.mode, x, t[at], m ? m + at : nullptr, plan.rule);
        v[i] = normalize_value(value, args.mean[c], args.std[c]);
      }
      if (++col == static_cast<int32_t>(args.width) - plan.x) {
        col = -plan.x;
        ++row;
      }
    }
    const int64_t first = out_offset(args, chunk, c, 0);
    if (chunk.count == 16 && args.layout == Layout::kNchw &&
        aligned16(static_cast<char*>(args.out) + first * size)) {
      store_run<dtype>(args.out, first, v);
    } else {
      PB_UNROLL
      for (int i = 0; i < 16; ++i) {
        if (i < chunk.count) store_one<dtype>(args.out, out_offset(args, chunk, c, i), v[i]);
      }
    }
    rotate(&q);
    t += area;
    if (m && args.mask_channels == 3) m += area;
  }
}

// All chunks of image b that belong to `lane`; table: [3, 256] normalised values of the levels.
template <DType dtype, bool quantized>
PB_HD void trigger_normalize_body(const TriggerNormalizeArgs& args, const SamplePlan& plan,
                                  const float* table, int64_t b, int32_t lane, int32_t lanes) {
  const int32_t pixels = static_cast<int32_t>(args.height * args.width);  // < 2^29
  const int32_t width = static_cast<int32_t>(args.width);
  for (int64_t pixel = int64_t{lane} * kChunk; pixel < pixels; pixel += int64_t{lanes} * kChunk) {
    Chunk chunk;
    chunk.image = b;
    chunk.pixel = static_cast<int32_t>(pixel);
    chunk.y = chunk.pixel / width;
    chunk.x = chunk.pixel - chunk.y * width;
    chunk.count = static_cast<int32_t>(min_of(kChunk, pixels - pixel));
    if (!quantized) {
      store_float_chunk<dtype>(args, plan, chunk, table, load_chunk(args, chunk));
      continue;
    }
    const bool warp = plan.triggered && args.mode == Mode::kWarp;
    Levels q = warp ? warp_chunk(args, plan, chunk) : load_chunk(args, chunk);
    if (plan.triggered && !warp) window_chunk(args, plan, chunk, &q);
    if (args.poisoned) store_poisoned(args, chunk, q);
    store_chunk<dtype>(args, plan, chunk, table, q);
  }
}

}  // namespace pybackdoor
