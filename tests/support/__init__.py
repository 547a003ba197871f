"""What several test modules share: problems, the rule that judges results, and the matrices they run over."""
