"""The implementations, by op. Packed as ``pyfast.kernels``; nothing here includes torch headers or
pybind11."""
