"""The two-stage recipe: data, tokenizer, autoencoder, English base, stage 1, stage 2, judge."""
