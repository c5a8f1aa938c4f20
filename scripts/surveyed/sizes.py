"""How small the models are, and the ids of tokens."""

WIDTH, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 16
VOCABULARY = 128
LAYERS, TOWER_LAYERS = 4, 3
SIDE, PATCH = 32, 4
PAD, BOS, EOS, IMAGE = 0, 1, 2, 5
# Ids of further special tokens, in the order in which a config names them.
SPECIALS = range(6, 60)
WORDS = 60  # the first id of an ordinary word
CODES = 100  # ids of codes that stand for parts of images, where a class has such
