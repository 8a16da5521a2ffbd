// contrastive_par's arithmetic on lines (rows, images, columns), by the lanes of a team.
//
// A row is taken in chunks of W elements; lane k takes the chunks k, k + lanes, ... The last one
// may be cut short by the row's end: its missing elements are 0.
#pragma once

#include "core/team.h"
#include "ops/contrastive_par.h"

namespace pybackdoor {

constexpr double kSmallestNorm = 1e-12;             // that a row is divided by
constexpr double kTinySum = 3.975449735908647e-31;  // e^-70: smaller sums are formed again
constexpr double kShiftFrom = 75;  // e^75 * 65,536 < FLT_MAX: a row of E has a finite sum

template <typename T>
PB_HD const T* in(const void* p) {
  return static_cast<const T*>(p);
}
template <typename T>
PB_HD T* out(void* p) {
  return static_cast<T*>(p);
}

template <typename A>
PB_HD A scale_of(const ContrastiveParArgs& args) {
  return *in<A>(args.scale);
}

template <typename A>
PB_HD A shift_of(const ContrastiveParArgs& args) {
  const A shift = scale_of<A>(args) - static_cast<A>(kShiftFrom);
  return shift < 0 ? 0 : shift;
}

PB_HD bool is_valid(const ContrastiveParArgs& args, int64_t own_image) {
  return args.bits[args.offset + own_image] & kValid;
}

template <typename A>
PB_HD bool needs_fixing(A sum) {  // NaN is left to propagate
  return sum < static_cast<A>(kTinySum) || sum == static_cast<A>(INFINITY);
}

template <typename A>
PB_HD A softplus(A z) {
  return (z > 0 ? z : 0) + std::log1p(std::exp(z > 0 ? -z : z));
}

template <typename A>
PB_HD A sigmoid(A z) {
  const A tail = std::exp(z > 0 ? -z : z);
  return (z > 0 ? A(1) : tail) / (1 + tail);
}

// Whether image `column` is no negative of text row `row`.
template <typename A>
PB_HD bool is_masked(const ContrastiveParArgs& args, int64_t row, int64_t column) {
  const A weight = in<A>(args.weight)[row];
  const uint8_t bits = args.bits[column];
  return weight == 0 || !(bits & kValid) || (weight < 0 && (bits & kSuspect)) ||
         column == args.offset + args.owner[row];
}

// Chunks ------------------------------------------------------------------------------------------

// Elements of a chunk: 16 B of T.
template <typename T>
constexpr int kChunkOf = 16 / static_cast<int>(sizeof(T));

template <int bytes>
struct alignas(bytes < 16 ? bytes : 16) Block {
  uint32_t w[bytes / 4];
};

// The chunk at p + k of a row of `size` elements. `aligned` rows start on whole chunks of all their
// tensors; the host need not care.
template <int W, typename T>
PB_HD void load_chunk(const T* p, int64_t k, int64_t size, bool aligned, Acc<T> (&v)[W]) {
  T raw[W];
  if (aligned && k + W <= size) {
    using Whole = Block<W* static_cast<int>(sizeof(T))>;
#ifdef __CUDA_ARCH__
    const Whole whole = *reinterpret_cast<const Whole*>(p + k);
    std::memcpy(raw, &whole, sizeof(raw));
#else
    static_assert(sizeof(Whole) == sizeof(raw), "");
    std::memcpy(raw, p + k, sizeof(raw));
#endif
    PB_UNROLL
    for (int i = 0; i < W; ++i) v[i] = widen(raw[i]);
  } else {
    PB_UNROLL
    for (int i = 0; i < W; ++i) v[i] = k + i < size ? widen(p[k + i]) : Acc<T>(0);
  }
}

template <int W, typename T>
PB_HD void store_chunk(T* p, int64_t k, int64_t size, bool aligned, const Acc<T> (&v)[W]) {
  T raw[W];
  PB_UNROLL
  for (int i = 0; i < W; ++i) narrow(v[i], &raw[i]);
  if (aligned && k + W <= size) {
#ifdef __CUDA_ARCH__
    Block<W* static_cast<int>(sizeof(T))> whole;
    std::memcpy(&whole, raw, sizeof(raw));
    *reinterpret_cast<decltype(whole)*>(p + k) = whole;
#else
    std::memcpy(p + k, raw, sizeof(raw));
#endif
  } else {
    PB_UNROLL
    for (int i = 0; i < W; ++i) {
      if (k + i < size) p[k + i] = raw[i];
    }
  }
}

template <int W, typename A>
PB_HD A fold(A (&v)[W]) {
  PB_UNROLL
  for (int step = W / 2; step > 0; step /= 2) {
    PB_UNROLL
    for (int i = 0; i < step; ++i) v[i] += v[i + step];
  }
  return v[0];
}

// Runs f(k) for the first element of each of the lane's chunks.
template <int W, int lanes, typename F>
PB_HD void each_chunk(int64_t size, int lane, F f) {
  PB_ROLLED
  for (int64_t k = int64_t{lane} * W; k < size; k += lanes * W) f(k);
}

template <int W, typename H, typename Team>
PB_HD Acc<H> dot(const H* x, const H* y, int64_t size, bool aligned, const Team& team) {
  using A = Acc<H>;
  return reduce(team,
                [&](int lane) {
                  A sum[W] = {};
                  each_chunk<W, Team::lanes>(size, lane, [&](int64_t k) {
                    A xs[W], ys[W];
                    load_chunk(x, k, size, aligned, xs);
                    load_chunk(y, k, size, aligned, ys);
                    PB_UNROLL
                    for (int i = 0; i < W; ++i) sum[i] += xs[i] * ys[i];
                  });
                  return Sums<A, 1>{{fold(sum)}};
                })
      .v[0];
}

// Stages ------------------------------------------------------------------------------------------

// Line < M: that text row, its norm, distance and target score; else image line - M.
template <typename T, typename H, int W, typename Team>
PB_HD void prep_line(const ContrastiveParArgs& args, int64_t line, bool aligned, const Team& team) {
  using A = Acc<T>;
  const bool is_text = line < args.rows;
  const int64_t row = is_text ? line : line - args.rows, size = args.features;
  const int64_t own_image = is_text ? args.owner[row] : row;
  const T* x = in<T>(is_text ? args.text : args.image) + row * size;
  const T* y = in<T>(args.image) + own_image * size;
  A inverse = 1;
  if (args.normalize || is_text) {
    const Sums<A, 3> sums = reduce(team, [&](int lane) {
      A xx[W] = {}, yy[W] = {}, xy[W] = {};
      each_chunk<W, Team::lanes>(size, lane, [&](int64_t k) {
        A xs[W], ys[W];
        load_chunk(x, k, size, aligned, xs);
        PB_UNROLL
        for (int i = 0; i < W; ++i) xx[i] += xs[i] * xs[i];
        if (!is_text) return;
        load_chunk(y, k, size, aligned, ys);
        PB_UNROLL
        for (int i = 0; i < W; ++i) {
          yy[i] += ys[i] * ys[i];
          xy[i] += xs[i] * ys[i];
        }
      });
      return Sums<A, 3>{{fold(xx), fold(yy), fold(xy)}};
    });
    const auto invert = [&](A square) {
      const A norm = std::sqrt(square), smallest = static_cast<A>(kSmallestNorm);
      return args.normalize ? 1 / (norm < smallest ? smallest : norm) : A(1);
    };
    inverse = invert(sums.v[0]);
    if (is_text && leads(team)) {
      const A cosine = sums.v[2] * inverse * invert(sums.v[1]);
      out<A>(args.target)[row] = scale_of<A>(args) * cosine;
    }
  }
  const T* refs = in<T>(is_text ? args.text_ref : args.image_ref);
  const T* ref = refs && is_valid(args, own_image) ? refs + row * size : nullptr;
  H* hat = out<H>(is_text ? args.that : args.ihat) + row * size;
  const Sums<A, 1> distance = reduce(team, [&](int lane) {
    A sum[W] = {};
    each_chunk<W, Team::lanes>(size, lane, [&](int64_t k) {
      A unit[W], rs[W];
      load_chunk(x, k, size, aligned, unit);
      PB_UNROLL
      for (int i = 0; i < W; ++i) unit[i] *= inverse;
      store_chunk(hat, k, size, aligned, unit);
      if (!ref) return;
      load_chunk(ref, k, size, aligned, rs);
      PB_UNROLL
      for (int i = 0; i < W; ++i) sum[i] += (unit[i] - rs[i]) * (unit[i] - rs[i]);
    });
    return Sums<A, 1>{{fold(sum)}};
  });
  if (leads(team)) {
    out<A>(is_text ? args.inv_text : args.inv_image)[row] = inverse;
    out<A>(is_text ? args.dist_text : args.dist_image)[row] = distance.v[0];
  }
}

// A lane's share of the sum of a line's partials: line < M is a text row, else column line - M.
template <typename A>
PB_HD A partial_sum(const ContrastiveParArgs& args, int64_t line, int lane, int lanes) {
  const bool is_row = line < args.rows;
  const A* p =
      is_row ? in<A>(args.row_partial) + line : in<A>(args.col_partial) + (line - args.rows);
  const int64_t slices = is_row ? args.row_slices : args.col_slices;
  const int64_t step = is_row ? args.rows : args.all_images;
  A sum = 0;
  for (int64_t k = lane; k < slices; k += lanes) sum += p[k * step];
  return sum;
}

template <typename A>
PB_HD void put_sum(const ContrastiveParArgs& args, int64_t line, A sum) {
  if (line < args.rows) {
    out<A>(args.r)[line] = sum;
  } else {
    out<A>(args.c)[line - args.rows] = sum;
  }
}

// log P of one of this rank's images.
template <typename A, typename Team>
PB_HD void log_positive(const ContrastiveParArgs& args, int64_t image, const Team& team) {
  const A shift = shift_of<A>(args);
  const LogSum<A> sum = reduce(team, [&](int lane) {
    LogSum<A> part = empty_log_sum<A>();
    const int64_t end = args.segment[image + 1];
    for (int64_t row = args.segment[image] + lane; row < end; row += Team::lanes) {
      if (in<A>(args.weight)[row] > 0) push(&part, in<A>(args.target)[row] - shift);
    }
    return part;
  });
  if (leads(team)) out<A>(args.log_p)[image] = value(sum);
}

template <typename A>
PB_HD void put_lse(const ContrastiveParArgs& args, int64_t line, A value) {
  if (line < args.rows) {
    out<A>(args.row_lse)[line] = value;
  } else {
    out<A>(args.col_lse)[line - args.rows] = value;
  }
}

// Whether a line's sum has to be formed again; else its entry is 0. Line < M is a text row, else
// column line - M.
template <typename A>
PB_HD bool lse_wanted(const ContrastiveParArgs& args, int64_t line) {
  const bool is_row = line < args.rows;
  const int64_t own = is_row ? line : line - args.rows;
  const bool wanted = in<A>(is_row ? args.weight : args.column_weight)[own] != 0 &&
                      needs_fixing(in<A>(is_row ? args.r : args.c)[own]);
  if (!wanted) put_lse(args, line, A(0));
  return wanted;
}

template <typename H, int W, typename Team>
PB_HD void lse_line(const ContrastiveParArgs& args, int64_t line, bool aligned, const Team& team) {
  using A = Acc<H>;
  const bool is_row = line < args.rows;
  const A scale = scale_of<A>(args), shift = shift_of<A>(args);
  const int64_t own = is_row ? line : line - args.rows, size = args.features;
  const int64_t others = is_row ? args.all_images : args.rows;
  const H* x = in<H>(is_row ? args.that : args.ihat) + own * size;
  const H* y = in<H>(is_row ? args.ihat : args.that);
  LogSum<A> sum = empty_log_sum<A>();
  const auto counts = [&](int64_t other) {
    return !is_masked<A>(args, is_row ? own : other, is_row ? other : own) &&
           (is_row || in<A>(args.weight)[other] > 0);
  };
  each_where(team, 0, others, counts, [&](int64_t other) {
    push(&sum, scale * dot<W>(x, y + other * size, size, aligned, team) - shift);
  });
  if (leads(team)) put_lse(args, line, value(sum));
}

PB_HD void count_up(int32_t* counter) {
#ifdef __CUDA_ARCH__
  atomicAdd(counter, 1);
#else
  __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
#endif
}

// Loss and factors of column j, and of all text rows of the image if it is one of this rank's own.
template <typename A, typename Team>
PB_HD void finalise_image(const ContrastiveParArgs& args, int64_t j, const Team& team) {
  constexpr A kNever = static_cast<A>(-INFINITY);
  const A shift = shift_of<A>(args), c = in<A>(args.c)[j], log_p = in<A>(args.log_p)[j];
  const A column_weight = in<A>(args.column_weight)[j];
  const bool fix = column_weight != 0 && needs_fixing(c);
  const A log_c = fix ? in<A>(args.col_lse)[j] : std::log(c);
  const bool off = log_c == kNever || log_p == kNever || column_weight == 0;
  const A y = off ? 0 : log_p - log_c;
  const A eta = off ? 0 : -column_weight * sigmoid(-y);
  const int64_t own = j - args.offset;
  const bool is_own = own >= 0 && own < args.images;
  if (leads(team)) {
    out<A>(args.beta)[j] = off || fix ? 0 : -eta / c;
    out<A>(args.col_fix)[j] = fix && !off ? -eta : 0;
    if (is_own) out<A>(args.loss_col)[own] = off ? 0 : column_weight * softplus(-y);
    if (fix && !off) count_up(args.flagged + 1);
  }
  if (!is_own) return;
  each_lane(team, [&](int lane) {
    const int64_t end = args.segment[own + 1];
    for (int64_t i = args.segment[own] + lane; i < end; i += Team::lanes) {
      const A weight = in<A>(args.weight)[i], r = in<A>(args.r)[i];
      const A target = in<A>(args.target)[i];
      const bool fix_row = weight != 0 && needs_fixing(r);
      const A log_r = fix_row ? in<A>(args.row_lse)[i] : std::log(r);
      const bool none = weight == 0 || log_r == kNever;
      const A z = none ? 0 : target - shift - log_r, sign = weight > 0 ? 1 : -1;
      const A magnitude = none ? 0 : std::abs(weight);
      const A gamma = -magnitude * sign * sigmoid(-sign * z);
      out<A>(args.loss_row)[i] = magnitude * softplus(-sign * z);
      out<A>(args.alpha)[i] = none || fix_row ? 0 : -gamma / r;
      out<A>(args.row_fix)[i] = fix_row && !none ? -gamma : 0;
      const A share = weight > 0 && !off ? eta * std::exp(target - shift - log_p) : 0;
      out<A>(args.coef)[i] = gamma + share;
      if (fix_row && !none) count_up(args.flagged);
    }
  });
}

// Sums of losses and distances, formed in type S.
template <typename A, typename S, typename Team>
PB_HD void totals(const ContrastiveParArgs& args, const Team& team) {
  const Sums<S, 5> sums = reduce(team, [&](int lane) {
    S loss = 0, text = 0, image = 0;
    int64_t texts = 0, images = 0;
    for (int64_t i = lane; i < args.rows; i += Team::lanes) {
      loss += in<A>(args.loss_row)[i];
      text += in<A>(args.dist_text)[i];
      texts += is_valid(args, args.owner[i]);
    }
    for (int64_t j = lane; j < args.images; j += Team::lanes) {
      loss += in<A>(args.loss_col)[j];
      image += in<A>(args.dist_image)[j];
      images += is_valid(args, j);
    }
    return Sums<S, 5>{{loss, text, static_cast<S>(texts), image, static_cast<S>(images)}};
  });
  if (!leads(team)) return;
  for (int k = 0; k < 5; ++k) out<A>(args.total)[k] = static_cast<A>(sums.v[k]);
}

template <typename A>
PB_HD void close(const ContrastiveParArgs& args) {
  const A* total = in<A>(args.total);
  A* stats = out<A>(args.stats);
  const A tau = static_cast<A>(args.tau), weight = static_cast<A>(args.distance_weight);
  A loss = total[0];
  for (int k = 0; k < 2; ++k) {  // image, text
    const A sum = total[k == 0 ? 3 : 1], count = total[k == 0 ? 4 : 2];
    const A mean = sum / (count < 1 ? 1 : count);
    stats[2 + k] = mean;
    stats[4 + k] = mean <= tau ? 1 : 0;
    if (!(mean > tau)) loss -= weight * mean;  // NaN, too
  }
  stats[0] = loss;
  stats[1] = total[0];
}

// Whether any dS of a line is fixed; line < M is a row of g_text, else one of g_image.
template <typename A>
PB_HD bool fixup_wanted(const ContrastiveParArgs& args, int64_t line) {
  if (line < args.rows) {
    return args.g_text && (in<A>(args.row_fix)[line] != 0 ||
                           (args.flagged[1] > 0 && in<A>(args.weight)[line] > 0));
  }
  return args.g_image && (in<A>(args.col_fix)[line - args.rows] != 0 || args.flagged[0] > 0);
}

template <typename H, int W, typename Team>
PB_HD void fixup_line(const ContrastiveParArgs& args, int64_t line, bool aligned,
                      const Team& team) {
  using A = Acc<H>;
  const bool is_row = line < args.rows;
  const A scale = scale_of<A>(args), shift = shift_of<A>(args);
  const int64_t own = is_row ? line : line - args.rows, size = args.features;
  const int64_t others = is_row ? args.all_images : args.rows;
  const H* x = in<H>(is_row ? args.that : args.ihat) + own * size;
  const H* y = in<H>(is_row ? args.ihat : args.that);
  A* g = out<A>(is_row ? args.g_text : args.g_image) + own * size;
  const auto fixed = [&](int64_t i) { return in<A>(args.row_fix)[i]; };
  const auto fixed_column = [&](int64_t i, int64_t j) {
    return in<A>(args.weight)[i] > 0 ? in<A>(args.col_fix)[j] : A(0);
  };
  const auto wanted = [&](int64_t other) {
    const int64_t i = is_row ? own : other, j = is_row ? other : own;
    return (fixed(i) != 0 || fixed_column(i, j) != 0) && !is_masked<A>(args, i, j);
  };
  each_where(team, 0, others, wanted, [&](int64_t other) {
    const int64_t i = is_row ? own : other, j = is_row ? other : own;
    const A row_fix = fixed(i), col_fix = fixed_column(i, j);
    const A s = scale * dot<W>(x, y + other * size, size, aligned, team) - shift;
    A ds = row_fix == 0 ? 0 : row_fix * std::exp(s - in<A>(args.row_lse)[i]);
    if (col_fix != 0) ds += col_fix * std::exp(s - in<A>(args.col_lse)[j]);
    each_lane(team, [&](int lane) {
      each_chunk<W, Team::lanes>(size, lane, [&](int64_t k) {
        A sum[W], ys[W];
        load_chunk(g, k, size, aligned, sum);
        load_chunk(y + other * size, k, size, aligned, ys);
        PB_UNROLL
        for (int n = 0; n < W; ++n) sum[n] += ds * ys[n];
        store_chunk(g, k, size, aligned, sum);
      });
    });
  });
}

// The gradient of one text row or image.
template <typename T, int W, typename Team>
PB_HD void normalize_backward_row(const ContrastiveParArgs& args, bool is_text, int64_t row,
                                  bool aligned, const Team& team) {
  using A = Acc<T>;
  const int64_t size = args.features, own_image = is_text ? args.owner[row] : row;
  const int64_t begin = is_text ? own_image : args.segment[row];
  const int64_t end = is_text ? own_image + 1 : args.segment[row + 1];
  const A scale = scale_of<A>(args), grad = *in<A>(args.grad);
  const A inverse = in<A>(is_text ? args.inv_text : args.inv_image)[row];
  const T* x = in<T>(is_text ? args.text : args.image) + row * size;
  const T* others = in<T>(is_text ? args.image : args.text);
  const A* other_inverse = in<A>(is_text ? args.inv_image : args.inv_text);
  const T* refs = in<T>(is_text ? args.text_ref : args.image_ref);
  const T* ref = refs && is_valid(args, own_image) ? refs + row * size : nullptr;
  A* g = out<A>(is_text ? args.g_text : args.g_image) + row * size;
  const bool keep = end - begin > 1;  // h of a chunk in g, rather than to form it twice
  const auto form = [&](int64_t k, A(&h)[W]) {
    load_chunk(g, k, size, aligned, h);
    for (int64_t other = begin; other < end; ++other) {
      const A factor = in<A>(args.coef)[is_text ? row : other] * other_inverse[other];
      A ys[W];
      load_chunk(others + other * size, k, size, aligned, ys);
      PB_UNROLL
      for (int i = 0; i < W; ++i) h[i] += factor * ys[i];
    }
    PB_UNROLL
    for (int i = 0; i < W; ++i) h[i] *= scale;
  };
  const Sums<A, 2> dots = reduce(team, [&](int lane) {
    A hu[W] = {}, ru[W] = {};
    each_chunk<W, Team::lanes>(size, lane, [&](int64_t k) {
      A h[W], unit[W], rs[W];
      form(k, h);
      if (keep) store_chunk(g, k, size, aligned, h);
      load_chunk(x, k, size, aligned, unit);
      PB_UNROLL
      for (int i = 0; i < W; ++i) {
        unit[i] *= inverse;
        hu[i] += h[i] * unit[i];
      }
      if (!ref) return;
      load_chunk(ref, k, size, aligned, rs);
      PB_UNROLL
      for (int i = 0; i < W; ++i) ru[i] += (unit[i] - rs[i]) * unit[i];
    });
    return Sums<A, 2>{{fold(hu), fold(ru)}};
  });
  A pull = 0;  // of the reference
  if (ref) {
    const A gate = in<A>(args.stats)[is_text ? 5 : 4], count = in<A>(args.total)[is_text ? 2 : 4];
    pull = static_cast<A>(-2 * args.distance_weight) * gate / (count < 1 ? 1 : count);
  }
  const bool inside = args.normalize && inverse < 1 / static_cast<A>(kSmallestNorm);
  const A along = inside ? dots.v[0] + pull * dots.v[1] : 0;
  T* d = out<T>(is_text ? args.d_text : args.d_image) + row * size;
  each_lane(team, [&](int lane) {
    each_chunk<W, Team::lanes>(size, lane, [&](int64_t k) {
      A h[W], unit[W], rs[W];
      if (keep) {
        load_chunk(g, k, size, aligned, h);
      } else {
        form(k, h);
      }
      load_chunk(x, k, size, aligned, unit);
      PB_UNROLL
      for (int i = 0; i < W; ++i) unit[i] *= inverse;
      if (ref) {
        load_chunk(ref, k, size, aligned, rs);
        PB_UNROLL
        for (int i = 0; i < W; ++i) h[i] += pull * (unit[i] - rs[i]);
      }
      PB_UNROLL
      for (int i = 0; i < W; ++i) h[i] = grad * (h[i] - along * unit[i]) * inverse;
      store_chunk(d, k, size, aligned, h);
    });
  });
  if (leads(team)) out<A>(is_text ? args.dot_text : args.dot_image)[row] = grad * dots.v[0];
}

}  // namespace pybackdoor
