"""A language model for a pod: 520 million parameters, 8 experts in each of 12 layers.

    uv run python train/moe_lm.py --config train/configs/moe_pod.py --out DIR --distributed

Run the same command on every host, with a DIR that all of them see. 26 billion tokens of TFDS's C4,
prepared beforehand. All chips share the batch, and in parts the 6 GB of parameters and the
optimiser's moments. Never run by us at this size: the recipe is tested at a small one, on several
devices.
"""

from recipe import LanguageRecipe

recipe = LanguageRecipe(
    model={
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    text=("tfds:c4/en",),
    held_out=0.0001,
    seq_len=2048,
    batch_size=256,
    steps=50_000,
    learning_rate=6e-4,
    warmup=2000,
    dtype="bfloat16",
    save_every=1000,
    evaluate_every=2000,
)
