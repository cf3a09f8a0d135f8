"""From images to batches of tokens: sources, crops, the tokenizing job, the token store, and views."""
