"""What a run takes, before it runs: a step traced without values, an estimate, and changes that make a run fit."""
