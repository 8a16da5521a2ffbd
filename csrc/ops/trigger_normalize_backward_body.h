// The arithmetic of trigger_normalize_backward, once, for the CPU and CUDA; see
// trigger_normalize_backward.h.
#pragma once

#include "ops/trigger_normalize_backward.h"
#include "ops/trigger_normalize_body.h"

namespace pybackdoor {

constexpr int kFour = 4;  // window pixels of one thread: 16 B of an fp32 gradient per channel

// A slice of a trigger's samples: [begin, end) in their order.
struct SampleRange {
  int64_t begin, end;
};

PB_HD SampleRange slice_samples(const TriggerNormalizeBackwardArgs& args, int64_t trigger,
                                int32_t slice) {
  const int64_t first = args.order ? args.begin[trigger] : 0;
  const int64_t count = (args.order ? args.begin[trigger + 1] : args.forward.batch) - first;
  return SampleRange{first + count * slice / args.slices,
                     first + count * (slice + 1) / args.slices};
}

PB_HD int64_t sample_at(const TriggerNormalizeBackwardArgs& args, int64_t i) {
  return args.order ? args.order[i] : i;
}

// How a sample's strength enters the sums.
PB_HD float gradient_strength(const TriggerNormalizeArgs& args, const SamplePlan& plan) {
  return args.mode == Mode::kPatch ? 1.f : static_cast<float>(plan.rule.strength);
}

// Up to four pixels of a window in row-major order, and their sums over samples.
struct WindowFour {
  int32_t first;     // of h * w
  int32_t row, col;  // of the first
  int32_t count;     // 1..4
};

struct GradSums {
  float sum[3][kFour], moment[3][kFour];
};

PB_HD WindowFour window_four(const TriggerNormalizeArgs& args, int64_t index) {
  WindowFour four;
  const int32_t w = static_cast<int32_t>(args.window_width);
  const int64_t area = args.window_height * args.window_width;
  four.first = static_cast<int32_t>(index * kFour);
  four.row = four.first / w;
  four.col = four.first - four.row * w;
  four.count = static_cast<int32_t>(min_of(kFour, area - four.first));
  return four;
}

template <DType dtype>
PB_HD void unpack(const Vec16& words, float (&v)[kFour]) {
  PB_UNROLL
  for (int k = 0; k < kFour; ++k) {
    if (dtype == DType::kFloat32) {
      v[k] = bits_float(words.w[k]);
    } else {
      const uint16_t half = static_cast<uint16_t>(words.w[k / 2] >> (16 * (k % 2)));
      v[k] = dtype == DType::kFloat16 ? from_float16(half) : from_bfloat16(half);
    }
  }
}

template <DType dtype>
PB_HD bool aligned_four(const void* p) {
  return dtype == DType::kFloat32 ? aligned16(p) : aligned8(p);
}

// Four elements that lie together, from an address that is a multiple of their size.
template <DType dtype>
PB_HD void load_four(const void* values, int64_t i, float (&v)[kFour]) {
  Vec16 words;
  if (dtype == DType::kFloat32) {
    words = load16(static_cast<const float*>(values) + i);
  } else {
    const Vec8 half = load8(static_cast<const uint16_t*>(values) + i);
    words = Vec16{{half.w[0], half.w[1], 0, 0}};
  }
  unpack<dtype>(words, v);
}

// Adds level x with the gradient g to the sums of one element. t, m: its pattern and mask (or
// null).
template <bool clip>
PB_HD void add_element(const SamplePlan& plan, float strength, uint32_t x, float g, const float* t,
                       const float* m, float* sum, float* moment) {
  float term = mul_rn(g, strength);
  if (clip) {
    float a = plan.rule.a, b = plan.rule.b;
    if (m) masked_weights(*m, plan.rule, &a, &b);
    const float value = mixed_value(static_cast<uint8_t>(x), *t, a, b);
    if (!(value >= 0.f && value <= 1.f)) term = 0.f;
  }
  *sum = add_rn(*sum, term);
  *moment = add_rn(*moment, mul_rn(term, static_cast<float>(x)));
}

// Four neighbours of one image: their levels, a byte a pixel, and gradients. False if not aligned.
template <DType dtype>
PB_HD bool load_run(const TriggerNormalizeArgs& args, const Chunk& at, uint32_t (&levels)[3],
                    float (&g)[3][kFour]) {
  constexpr int64_t size = dtype == DType::kFloat32 ? 4 : 2;
  const int64_t plane = args.height * args.width;
  const int32_t p = args.patch_size;
  const bool nhwc = args.input_layout == InputLayout::kNhwc;
  const bool last = args.layout == Layout::kChannelsLast;
  const uint8_t* image = args.images + first_byte(args, at, 0);
  const char* base = static_cast<const char*>(args.out);
  const int64_t first = out_offset(args, at, 0, 0);
  const int64_t channel = last ? kFour : args.layout == Layout::kNchw ? plane : int64_t{p} * p;
  bool aligned = aligned4(image) && aligned_four<dtype>(base + first * size) &&
                 aligned_four<dtype>(base + (first + channel) * size);
  if (!nhwc) aligned = aligned && plane % 4 == 0;
  if (args.layout == Layout::kPatchified) {
    aligned = aligned && p % kFour == 0 && at.pixel % static_cast<int32_t>(args.width) % kFour == 0;
  }
  if (!aligned) return false;
  if (nhwc) {
    const uint32_t u = load4(image), v = load4(image + 4), w = load4(image + 8);
    levels[0] = (u & 255u) | (u >> 24) << 8 | (v >> 16 & 255u) << 16 | (w >> 8 & 255u) << 24;
    levels[1] = (u >> 8 & 255u) | (v & 255u) << 8 | (v >> 24) << 16 | (w >> 16 & 255u) << 24;
    levels[2] = (u >> 16 & 255u) | (v >> 8 & 255u) << 8 | (w & 255u) << 16 | (w >> 24) << 24;
  } else {
    PB_UNROLL
    for (int c = 0; c < 3; ++c) levels[c] = load4(image + c * plane);
  }
  float v[3][kFour];
  PB_UNROLL
  for (int k = 0; k < 3; ++k) load_four<dtype>(base, first + k * channel, v[k]);
  PB_UNROLL
  for (int e = 0; e < 3 * kFour; ++e) {  // channels_last: twelve in (pixel, channel) order
    g[e % 3][e / 3] = last ? v[e / kFour][e % kFour] : v[e % 3][e / 3];
  }
  return true;
}

// Brings the next pixel to the front, as registers cannot be indexed.
PB_HD void rotate(GradSums* sums) {
  PB_UNROLL
  for (int c = 0; c < 3; ++c) {
    const float sum = sums->sum[c][0], moment = sums->moment[c][0];
    PB_UNROLL
    for (int i = 0; i + 1 < kFour; ++i) {
      sums->sum[c][i] = sums->sum[c][i + 1];
      sums->moment[c][i] = sums->moment[c][i + 1];
    }
    sums->sum[c][kFour - 1] = sum;
    sums->moment[c][kFour - 1] = moment;
  }
}

// Adds one sample to the sums of four pixels of its trigger.
template <DType dtype, bool clip>
PB_HD void add_sample(const TriggerNormalizeArgs& args, const SamplePlan& plan, int64_t b,
                      const WindowFour& four, GradSums* sums) {
  const int32_t width = static_cast<int32_t>(args.width);
  const int32_t height = static_cast<int32_t>(args.height);
  const int32_t w = static_cast<int32_t>(args.window_width);
  const int64_t area = args.window_height * args.window_width;
  const float strength = gradient_strength(args, plan);
  const float* t = args.pattern + int64_t{plan.trigger} * 3 * area + four.first;
  const float* m = args.mask
                       ? args.mask + int64_t{plan.trigger} * args.mask_channels * area + four.first
                       : nullptr;
  const int64_t mask_step = args.mask_channels == 3 ? area : 0;
  const int32_t y = plan.y + four.row, x = plan.x + four.col, side = plan.erase_side;
  const bool whole = w % kFour == 0 && y >= 0 && y < height && x >= 0 && x + kFour <= width;
  const bool erased = y >= plan.erase_y && y < plan.erase_y + side && x + kFour > plan.erase_x &&
                      x < plan.erase_x + side;
  uint32_t levels[3];
  float g[3][kFour];
  Chunk at = {};
  at.image = b;
  at.pixel = y * width + x;
  if (whole && !erased && load_run<dtype>(args, at, levels, g)) {
    PB_UNROLL
    for (int c = 0; c < 3; ++c) {
      PB_UNROLL
      for (int i = 0; i < kFour; ++i) {
        add_element<clip>(plan, strength, byte_of(levels[c], i), g[c][i], t + c * area + i,
                          m ? m + c * mask_step + i : nullptr, &sums->sum[c][i],
                          &sums->moment[c][i]);
      }
    }
    return;
  }
  int32_t row = y, col = four.col;
  PB_ROLLED
  for (int i = 0; i < kFour; ++i) {
    const int32_t px = plan.x + col;
    const bool hidden = row >= plan.erase_y && row < plan.erase_y + side && px >= plan.erase_x &&
                        px < plan.erase_x + side;
    if (i < four.count && row >= 0 && row < height && px >= 0 && px < width && !hidden) {
      at.pixel = row * width + px;
      PB_UNROLL
      for (int c = 0; c < 3; ++c) {
        const int64_t byte =
            first_byte(args, at, c) + (args.input_layout == InputLayout::kNhwc ? c : 0);
        add_element<clip>(plan, strength, args.images[byte],
                          from_bits<dtype>(args.out, out_offset(args, at, c, 0)), t + c * area + i,
                          m ? m + c * mask_step + i : nullptr, &sums->sum[c][0],
                          &sums->moment[c][0]);
      }
    }
    rotate(sums);
    if (++col == w) {
      col = 0;
      ++row;
    }
  }
}

// Only a blend's clip depends on the image; a patch is dealt with by `finish_pixel`.
PB_HD bool clips_samples(const TriggerNormalizeArgs& args) {
  return args.clip && args.mode == Mode::kBlend;
}

PB_HD int64_t partial_kinds(const TriggerNormalizeBackwardArgs& args) {
  return args.mask_grad ? 2 : 1;
}

PB_HD void store_partial(const TriggerNormalizeBackwardArgs& args, int64_t trigger, int32_t slice,
                         const WindowFour& four, const GradSums& sums) {
  const int64_t area = args.forward.window_height * args.forward.window_width;
  const int64_t kinds = partial_kinds(args);
  float* p = args.partial + (trigger * args.slices + slice) * kinds * 3 * area + four.first;
  PB_UNROLL
  for (int c = 0; c < 3; ++c) {
    PB_UNROLL
    for (int i = 0; i < kFour; ++i) {
      if (i >= four.count) continue;
      p[c * area + i] = sums.sum[c][i];
      if (args.mask_grad) p[(3 + c) * area + i] = sums.moment[c][i];
    }
  }
}

// The gradients of pixel `at` of a trigger from its sums over all samples.
PB_HD void finish_pixel(const TriggerNormalizeBackwardArgs& args, int64_t trigger, int64_t at,
                        const float (&sum)[3], const float (&moment)[3]) {
  const TriggerNormalizeArgs& f = args.forward;
  const int64_t area = f.window_height * f.window_width;
  float shared = 0.f;
  PB_UNROLL
  for (int c = 0; c < 3; ++c) {
    const int64_t channel = trigger * f.mask_channels + (f.mask_channels == 3 ? c : 0);
    const int64_t element = (trigger * 3 + c) * area + at;
    const float t = f.pattern[element];
    const float m = f.mask ? f.mask[channel * area + at] : 1.f;
    const bool fast = (f.nonzero_only && t == 0.f) ||
                      (f.mode == Mode::kPatch && f.clip && !(t >= 0.f && t <= 1.f));
    if (args.pattern_grad) {
      args.pattern_grad[element] = fast ? 0.f : div_rn(mul_rn(m, sum[c]), f.std[c]);
    }
    if (args.mask_grad) {
      float d = mul_rn(t, sum[c]);
      if (!f.additive) d = add_rn(d, -div_rn(moment[c], 255.f));
      d = fast ? 0.f : div_rn(d, f.std[c]);
      if (f.mask_channels == 3) args.mask_grad[channel * area + at] = d;
      shared = add_rn(shared, d);
    }
  }
  if (args.mask_grad && f.mask_channels == 1) args.mask_grad[trigger * area + at] = shared;
}

// Adds the slices of one pixel in order.
PB_HD void reduce_pixel(const TriggerNormalizeBackwardArgs& args, int64_t trigger, int64_t at) {
  const int64_t area = args.forward.window_height * args.forward.window_width;
  const int64_t step = partial_kinds(args) * 3 * area;
  const float* p = args.partial + trigger * args.slices * step + at;
  float sum[3] = {}, moment[3] = {};
  PB_ROLLED
  for (int32_t slice = 0; slice < args.slices; ++slice, p += step) {
    PB_UNROLL
    for (int c = 0; c < 3; ++c) {
      sum[c] = add_rn(sum[c], p[c * area]);
      if (args.mask_grad) moment[c] = add_rn(moment[c], p[(3 + c) * area]);
    }
  }
  finish_pixel(args, trigger, at, sum, moment);
}

}  // namespace pybackdoor
