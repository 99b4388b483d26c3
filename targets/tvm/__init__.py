"""Compile fused graphs with TVM (`compiler`) and run them (`engine`); both know a `compiled_folder`."""
