"""Change the last linear of a decoder: its NormHead, its bias, and the positions whose logits it computes."""
