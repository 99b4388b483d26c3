"""Hold models: graphs (`graph`), files and canonical text (`serialization`), and lazy weights (`weights`).

This is the floor of the house: it stands on onnx-ir and imports nothing else of passopt.
"""
