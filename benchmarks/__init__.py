"""Benchmarks in VLMEvalKit's TSV format: reading records, gold and extracted answers, scores."""
