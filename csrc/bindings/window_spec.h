// WindowSpec: the arguments of a window attention call except its tensors, parsed from the text that
// swinkernels/window_spec.py writes.
#pragma once

#include <array>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "checks.h"
#include "geometry.h"
#include "params/window_attention.h"

namespace swinkernels {

// Every list has three values, one per axis, with the slowest axis first; a 2D map has a leading axis of size 1. A
// field that is missing in the text keeps its default.
struct WindowSpec {
  using Axes = std::array<int64_t, 3>;
  Axes window_size{1, 1, 1}, shift_size{}, table_window{1, 1, 1}, pad_before{}, periodic{}, key_window{1, 1, 1},
      table_pairs{};
  int64_t table_types = 1;
  bool roll_then_pad = false, grid = false, axis_tables = false, allow_tf32 = false, needs_lse = true;
  double scale, mask_value, dropout_p;

  // Parses "name=value;name=value;...". window_size comes first, because it sets the defaults of other fields.
  WindowSpec(const std::string& wire, double scale, double mask_value, double dropout_p)
      : scale(scale), mask_value(mask_value), dropout_p(dropout_p) {
    for (const char* next = wire.c_str(); *next != '\0';) {
      const char* equals = next;
      while (*equals != '=' && *equals != '\0') ++equals;
      const std::string_view name(next, equals - next);
      STD_TORCH_CHECK(*equals == '=', "swinkernels: a window spec is name=value;..., got ", wire);
      const char* end = read(name, equals + 1);
      STD_TORCH_CHECK(end != nullptr && (*end == ';' || *end == '\0'), "swinkernels: no window spec has ",
                      std::string(name), " as in ", wire);
      next = *end == ';' ? end + 1 : end;
    }
  }

  // Sets the params that the spec defines for a map of `size`.
  void fill(WindowAttentionForwardParams& p, const Ints& size) const {
    WindowGeometry& g = p.geometry;
    static_cast<FrameGeometry&>(g) = frame_geometry(size, window_size, shift_size, pad_before, roll_then_pad);
    for (int64_t i = 0; i < 3; ++i) {
      g.table_window[i] = static_cast<int32_t>(table_window[i]);
      g.periodic[i] = periodic[i] != 0;
      const int64_t beyond = key_window[i] - window_size[i];
      STD_TORCH_CHECK(beyond >= 0 && beyond % 2 == 0 && (beyond == 0 || !(shift_size[i] || grid || axis_tables)),
                      "swinkernels: a key window extends the window by the same number on both sides, without a shift");
      g.key_margin[i] = static_cast<int32_t>(beyond / 2);
      g.table_pairs[i] = table_pairs[i] != 0;
    }
    g.grid = grid;
    p.allow_tf32 = allow_tf32;
    p.scale = static_cast<float>(scale);
    p.mask_value = static_cast<float>(mask_value);
    p.dropout_p = static_cast<float>(dropout_p);
  }

 private:
  // Parses one value. Returns a pointer to the end of the value, or null for an unknown name.
  const char* read(std::string_view name, const char* value) {
    if (name == "window_size") {
      const char* end = axes(window_size, value);
      table_window = key_window = window_size;
      return end;
    }
    if (name == "shift_size") return axes(shift_size, value);
    if (name == "needs_lse") return flag(needs_lse, value);
    if (name == "table_window") return axes(table_window, value);
    if (name == "pad_before") return axes(pad_before, value);
    if (name == "periodic") return axes(periodic, value);
    if (name == "key_window") return axes(key_window, value);
    if (name == "table_pairs") return axes(table_pairs, value);
    if (name == "table_types") {
      char* end;
      table_types = std::strtoll(value, &end, 10);
      return end;
    }
    if (name == "pad_order") {
      roll_then_pad = *value == 'r';
      while (*value != ';' && *value != '\0') ++value;
      return value;
    }
    if (name == "grid") return flag(grid, value);
    if (name == "axis_tables") return flag(axis_tables, value);
    if (name == "allow_tf32") return flag(allow_tf32, value);
    return nullptr;
  }

  // Parses two or three integers, which belong to the last axes.
  static const char* axes(Axes& values, const char* text) {
    int64_t read[3], count = 0;
    char* end;
    for (const char* next = text; count < 3; next = end + 1) {
      read[count++] = std::strtoll(next, &end, 10);
      if (*end != ',') break;
    }
    for (int64_t i = 0; i < count; ++i) values[3 - count + i] = read[i];
    return end;
  }

  static const char* flag(bool& value, const char* text) {
    value = *text == '1';
    return text + 1;
  }
};

}  // namespace swinkernels
