"""Compile fused graphs with TVM (`compiler`) and run them (`engine`); both use the format in `compiled_folder`."""
