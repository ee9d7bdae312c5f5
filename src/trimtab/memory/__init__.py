"""What a run takes before it runs: the room there is, a traced step, and changes that would make it fit."""
