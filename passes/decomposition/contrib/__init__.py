"""Say what onnxruntime's own operators compute, in standard operators; decompose-contrib builds that."""
