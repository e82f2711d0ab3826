"""Everything that differs between TensorRT 8.6, 10, 11 and TensorRT for RTX. Nothing else asks for a version.

`libraries` finds a TensorRT and tells what its version has, `building` makes plans, `header` reads the first bytes of
one, `running` loads and runs it, and `messages` says what TensorRT's errors mean.

Every flag and method is asked for by its name, never by its number (the numbers moved between 10 and 11). What not
every version has is in `libraries.FEATURES`; the tests hold that table, and each attribute used here and in the modules
that build and run engines, against what the real bindings of each version have. For that test, variables that hold
TensorRT objects have one name each: `trt`, `builder`, `network`, `parser`, `config`, `optimization`, `runtime`,
`engine`, `context`, `inspector`, `layer`, `tensor`, `problem`, `timing`.
"""
