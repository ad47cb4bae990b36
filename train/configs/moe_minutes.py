"""A first language model: 0.7 million parameters, 8 experts in each of 2 layers.

    uv run python train/moe_lm.py --config train/configs/moe_minutes.py --out minutes

About a minute on 2 CPU cores; ends at a held-out perplexity of 46.
Text: the King James Bible, see train/data/README.md; --text FILE trains on your own.
"""

from recipe import LanguageRecipe

recipe = LanguageRecipe(
    model={
        "model_type": "mixtral",
        "vocab_size": 1024,
        "hidden_size": 96,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    },
    text=("../data/king_james.txt",),
    held_out=0.01,
    seq_len=128,
    batch_size=8,
    steps=600,
    learning_rate=5e-3,
    warmup=50,
    save_every=200,
    evaluate_every=200,
)
