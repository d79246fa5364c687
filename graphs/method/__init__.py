"""Long-context methods whose graphs are static, one file each, behind one protocol. Integers and numpy only."""
