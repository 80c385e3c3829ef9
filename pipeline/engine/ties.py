"""How far apart two logits may be and still count as a tie, in the whole program.

Two ways to compute a logit (step by step or a text at once, one token or a block) sum in different orders. In float32
the results differ by 1e-5. Bfloat16 keeps 8 bits: around 16 to 32, where the best logits of GPT-OSS lie, neighbours are
0.125 apart, and 0.25 is two of them.
"""

TIE_GAP = {"float32": 1e-3, "bfloat16": 0.25}
