"""The model that `mcjax demo` compresses: 3.6 million parameters, 8 experts in each of 4 layers.

    uv run python train/moe_lm.py --config train/configs/moe_embedded.py --out embedded

25 minutes on 2 CPU cores; ends at a perplexity of 27.3 on the last hundredth of its text and of
18.7 on `mcjax/embedded/held_out.txt`. Text: the King James Bible but for every twentieth chapter,
3.9 MB, see train/data/README.md.
"""

from recipe import LanguageRecipe

recipe = LanguageRecipe(
    model={
        "model_type": "mixtral",
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
    text=("../data/king_james.txt",),
    held_out=0.01,
    seq_len=256,
    batch_size=8,
    steps=4000,
    learning_rate=3e-3,
    warmup=200,
    balance=0.02,
    save_every=500,
    evaluate_every=500,
)
