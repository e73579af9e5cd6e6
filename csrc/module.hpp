// How a room enters the Python module: one PYSEQ_ROOM in one of its files, and no list of rooms anywhere.
#pragma once

#include <pybind11/pybind11.h>

namespace pyseq {

struct Room {
  const char* name;
  void (*bind)(pybind11::module_&);
  const Room* next;
  Room(const char* name, void (*bind)(pybind11::module_&)) : name(name), bind(bind), next(first()) { first() = this; }
  static const Room*& first() {
    static const Room* room = nullptr;
    return room;
  }
};

}  // namespace pyseq

// PYSEQ_ROOM(name, m) { m.def(...); } fills the submodule pyseq._C.<name>.
#define PYSEQ_ROOM(room, m)                                 \
  static void bind_##room(pybind11::module_&);              \
  static const pyseq::Room room_##room(#room, bind_##room); \
  static void bind_##room(pybind11::module_& m)
