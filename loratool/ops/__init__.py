"""The verbs, one file each: `plan -> validate -> execute -> report`. Library functions return reports, never print."""
