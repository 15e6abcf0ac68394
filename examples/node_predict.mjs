// Classifies an image with transformers.js in Node, from a local checkpoint with its ONNX file.
//
//     npm install @huggingface/transformers@4.3.1
//     python export.py outputs/digits --to onnx
//     node examples/node_predict.mjs outputs/digits image.png

import fs from "node:fs";
import path from "node:path";
import { AutoModel, PretrainedConfig, RawImage, Tensor, env } from "@huggingface/transformers";
import { preprocess, probabilities } from "../sharing/page/resize.js"; // resizes as Pillow does, unlike transformers.js

if (process.argv.length !== 4 || !process.argv.every((name) => fs.existsSync(name))) {
  console.error("usage: node examples/node_predict.mjs CHECKPOINT IMAGE, a folder and a file that exist");
  process.exit(2);
}
const [folder, file] = process.argv.slice(2).map((name) => path.resolve(name));
const read = (name) => JSON.parse(fs.readFileSync(path.join(folder, name), "utf8"));
const config = read("config.json"), processor = read("preprocessor_config.json");
if (processor.do_pad || [processor.do_resize, processor.do_rescale, processor.do_normalize].includes(false)) {
  console.error("this program resizes, rescales and normalizes, and does not pad; use the image processor");
  process.exit(2);
}

Object.assign(env, { allowRemoteModels: false, localModelPath: path.dirname(folder) });
const asVit = new PretrainedConfig({ ...config, model_type: "vit" }); // transformers.js does not know vit_simple
const model = await AutoModel.from_pretrained(path.basename(folder), { config: asVit, dtype: "fp32" });

const { pixelValues, width, height } = preprocess(await RawImage.read(file), processor);
const { logits } = await model({ pixel_values: new Tensor("float32", pixelValues, [1, 3, height, width]) });
const scores = probabilities(logits.data, config.problem_type), best = scores.indexOf(Math.max(...scores));
const shown = config.problem_type === "regression" ? Object.keys(scores) : [best];
console.log(`${path.basename(file)}: ${shown.map((i) => `${config.id2label[i]} ${scores[i].toFixed(4)}`).join(", ")}`);
