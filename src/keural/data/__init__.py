"""The data room: rows of files become records, records become token stores, token stores become the batch of any training step."""
