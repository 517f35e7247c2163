// The Python module swinkernels._state, which compares torch modules with facts recorded before. The class _State in
// swinkernels/adapters/checks.py records them, and its method _tensors_if_current is the same comparison in Python.
//
// The code uses Python's limited API and no headers of torch, so one library runs under every Python and torch.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

namespace {

// An owned reference to a Python object, or nullptr after an error.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) {}
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() { Py_XDECREF(object_); }

  PyObject* get() const { return object_; }

 private:
  PyObject* object_;
};

// Thrown while a Python exception is set.
struct PythonError {};

PyObject* checked(PyObject* object) {
  if (object == nullptr) throw PythonError();
  return object;
}

// Names of attributes, as Python objects.
struct Names {
  static const Names& get() {
    static const Names names;
    return names;
  }
  static PyObject* make(const char* name) { return checked(PyUnicode_InternFromString(name)); }

  PyObject* modules = make("_modules");
  PyObject* parameters = make("_parameters");
  PyObject* buffers = make("_buffers");
  PyObject* hooks[4] = {make("_forward_hooks"), make("_forward_pre_hooks"), make("_backward_hooks"),
                        make("_backward_pre_hooks")};
  PyObject* shape = make("shape");
  PyObject* dtype = make("dtype");
  PyObject* device = make("device");
  PyObject* layout = make("layout");
  PyObject* version = make("_version");
  PyObject* requires_grad = make("requires_grad");
};

bool equal(PyObject* one, PyObject* other) {
  if (one == other) return true;
  const int result = PyObject_RichCompareBool(one, other, Py_EQ);
  if (result < 0) throw PythonError();
  return result == 1;
}

bool has_equal(PyObject* object, PyObject* name, PyObject* value) {
  const Owned found(checked(PyObject_GetAttr(object, name)));
  return equal(found.get(), value);
}

bool has_same(PyObject* object, PyObject* name, PyObject* value) {
  const Owned found(checked(PyObject_GetAttr(object, name)));
  return found.get() == value;
}

// These return borrowed references. An item that is missing is an error.
PyObject* item(PyObject* tuple, Py_ssize_t i) { return checked(PyTuple_GetItem(tuple, i)); }

PyObject* value_of(PyObject* dict, PyObject* key) {
  PyObject* found = PyDict_GetItemWithError(dict, key);
  if (found == nullptr && !PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, key);
  return checked(found);
}

Py_ssize_t size_of(PyObject* object) {
  const Py_ssize_t size = PyObject_Size(object);
  if (size < 0) throw PythonError();
  return size;
}

Py_ssize_t number_of(PyObject* object) {
  const Py_ssize_t number = PyLong_AsSsize_t(object);
  if (number == -1 && PyErr_Occurred()) throw PythonError();
  return number;
}

// The tuple _State._facts, whose items are tuples as well. `kinds`, `sizes` and `attributes` have one item for each
// module: first the compared module, then those inside it. The other tuples are flat, in the same order of modules.
struct Facts {
  explicit Facts(PyObject* facts)
      : inner(item(facts, 0)),
        kinds(item(facts, 1)),
        sizes(item(facts, 2)),
        attributes(item(facts, 3)),
        values(item(facts, 4)),
        names(item(facts, 5)),
        positions(item(facts, 6)),
        modules(item(facts, 7)),
        tensors(item(facts, 8)),
        types(item(facts, 9)),
        metadata(item(facts, 10)),
        buffers(item(facts, 11)),
        tensor(item(facts, 12)) {}

  PyObject *inner, *kinds, *sizes, *attributes, *values;
  // The names in the dicts _modules, _parameters and _buffers of each module, and the places of the inner modules.
  PyObject *names, *positions;
  // Modules and tensors that are other attributes: (place of the owner, name, reference) and (place, name).
  PyObject *modules, *tensors;
  PyObject *types, *metadata, *buffers;
  PyObject* tensor;  // the class torch.Tensor, of which all buffers are
};

class Comparison {
 public:
  explicit Comparison(PyObject* facts) : facts_(facts) {}

  // Returns the tensors of the module and those inside it if all are as the facts say, else None.
  PyObject* tensors_if_current(PyObject* module) {
    return is_current(module) ? Py_NewRef(tensors_.get()) : Py_NewRef(Py_None);
  }

 private:
  static PyObject* type_of(PyObject* object) { return reinterpret_cast<PyObject*>(Py_TYPE(object)); }

  bool is_current(PyObject* module) {
    const Py_ssize_t count = size_of(facts_.kinds);
    // The modules, and in the end None, which may take the place of an inner module.
    const Owned modules(checked(PyTuple_New(count + 1)));
    PyTuple_SetItem(modules.get(), 0, Py_NewRef(module));
    PyTuple_SetItem(modules.get(), count, Py_NewRef(Py_None));
    for (Py_ssize_t i = 1; i < count; ++i) {
      PyTuple_SetItem(modules.get(), i, checked(PyObject_CallNoArgs(item(facts_.inner, i - 1))));
    }
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* one = item(modules.get(), i);
      if (type_of(one) != item(facts_.kinds, i)) return false;
      const Owned state(checked(PyObject_GenericGetDict(one, nullptr)));
      if (!has_attributes(state.get(), i) || (i > 0 && has_hooks(state.get())) ||
          !has_modules(value_of(state.get(), names_.modules), modules.get()) ||
          !has_tensors(value_of(state.get(), names_.parameters)) ||
          !has_tensors(value_of(state.get(), names_.buffers))) {
        return false;
      }
    }
    for (Py_ssize_t i = 0; i < size_of(facts_.modules); ++i) {
      PyObject* place = item(facts_.modules, i);
      const Owned known(checked(PyObject_CallNoArgs(item(place, 2))));
      if (attribute(modules.get(), place) != known.get()) return false;
    }
    for (Py_ssize_t i = 0; i < size_of(facts_.tensors); ++i) {
      if (!is_next_tensor(attribute(modules.get(), item(facts_.tensors, i)))) return false;
    }
    return compared_ == size_of(facts_.types);
  }

  // Returns the attribute at (place of the owner, name), as a borrowed reference: the owner's dict holds it.
  PyObject* attribute(PyObject* modules, PyObject* place) {
    const Owned state(checked(PyObject_GenericGetDict(item(modules, number_of(item(place, 0))), nullptr)));
    return value_of(state.get(), item(place, 1));
  }

  bool has_attributes(PyObject* state, Py_ssize_t i) {
    if (size_of(state) != number_of(item(facts_.sizes, i))) return false;
    PyObject* names = item(facts_.attributes, i);
    const Py_ssize_t count = size_of(names);
    for (Py_ssize_t j = 0; j < count; ++j) {
      if (value_of(state, item(names, j)) != item(facts_.values, values_++)) return false;
    }
    return true;
  }

  bool has_hooks(PyObject* state) {
    for (PyObject* hooks : names_.hooks) {
      if (size_of(value_of(state, hooks)) != 0) return true;
    }
    return false;
  }

  // Compares the names in a dict with the next names, in order. Only a plain dict has one order.
  bool has_names(PyObject* dict) {
    PyObject* names = item(facts_.names, dicts_++);
    if (type_of(dict) != reinterpret_cast<PyObject*>(&PyDict_Type) || size_of(dict) != size_of(names)) return false;
    PyObject* name;
    for (Py_ssize_t i = 0, place = 0; PyDict_Next(dict, &place, &name, nullptr); ++i) {
      if (!equal(name, item(names, i))) return false;
    }
    return true;
  }

  bool has_modules(PyObject* dict, PyObject* modules) {
    if (!has_names(dict)) return false;
    PyObject* module;
    for (Py_ssize_t place = 0; PyDict_Next(dict, &place, nullptr, &module);) {
      if (module != item(modules, number_of(item(facts_.positions, positions_++)))) return false;
    }
    return true;
  }

  bool has_tensors(PyObject* dict) {
    const Owned tensors(Py_NewRef(dict));  // a torch function mode may run any code when it sees a tensor's attributes
    if (!has_names(dict)) return false;
    PyObject* tensor;
    for (Py_ssize_t place = 0; PyDict_Next(dict, &place, nullptr, &tensor);) {
      if (!is_next_tensor(tensor)) return false;
    }
    return true;
  }

  // Compares a tensor, or None, with the next type and, if it is a tensor, the next metadata. A buffer also has to be
  // the same tensor, with the same version.
  bool is_next_tensor(PyObject* object) {
    if (compared_ == size_of(facts_.types)) return false;
    PyObject* type = item(facts_.types, compared_);
    PyTuple_SetItem(tensors_.get(), compared_++, Py_NewRef(object));
    if (type_of(object) != type) return false;
    if (object == Py_None) return true;
    PyObject* metadata = item(facts_.metadata, metadata_++);
    if (!has_equal(object, names_.shape, item(metadata, 0)) || !has_same(object, names_.dtype, item(metadata, 1)) ||
        !has_equal(object, names_.device, item(metadata, 2)) || !has_same(object, names_.layout, item(metadata, 3))) {
      return false;
    }
    if (type != facts_.tensor) return true;
    PyObject *buffer = item(facts_.buffers, buffers_++), *version = item(buffer, 1);
    const Owned known(checked(PyObject_CallNoArgs(item(buffer, 0))));
    return known.get() == object && has_equal(object, names_.version, item(version, 0)) &&
           has_same(object, names_.requires_grad, item(version, 1));
  }

  const Names& names_ = Names::get();
  const Facts facts_;
  const Owned tensors_{checked(PyTuple_New(size_of(facts_.types)))};
  // The next item of each flat tuple; dicts_ counts items of names, and compared_ those of types.
  Py_ssize_t values_ = 0, dicts_ = 0, positions_ = 0, compared_ = 0, metadata_ = 0, buffers_ = 0;
};

PyObject* tensors_if_current(PyObject*, PyObject* arguments) {
  PyObject *module, *facts;
  if (!PyArg_ParseTuple(arguments, "OO!:tensors_if_current", &module, &PyTuple_Type, &facts)) return nullptr;
  try {
    return Comparison(facts).tensors_if_current(module);
  } catch (const PythonError&) {
    return nullptr;
  }
}

PyMethodDef methods[] = {
    {"tensors_if_current", tensors_if_current, METH_VARARGS,
     "tensors_if_current(module, facts): return the tensors of a module and of those inside it, or None if something "
     "differs from the facts recorded before."},
    {nullptr, nullptr, 0, nullptr},
};

int set_constants(PyObject* module) { return PyModule_AddIntConstant(module, "LAYOUT", 2); }

PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void*>(set_constants)}, {0, nullptr}};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "swinkernels._state",
    "Compares torch modules with facts recorded before.",
    0,
    methods,
    slots,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__state() { return PyModuleDef_Init(&definition); }
