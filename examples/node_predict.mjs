// Classifies an image with transformers.js in Node, from a local checkpoint with its ONNX file.
//
//     npm install @huggingface/transformers
//     python export.py outputs/digits --to onnx
//     node examples/node_predict.mjs outputs/digits image.png

import fs from "node:fs";
import path from "node:path";
import { AutoModel, PretrainedConfig, RawImage, Tensor, env, softmax } from "@huggingface/transformers";
import { preprocess } from "../sharing/page/resize.js"; // resizes as Pillow does, unlike transformers.js

const [folder, file] = process.argv.slice(2).map((name) => path.resolve(name));
const read = (name) => JSON.parse(fs.readFileSync(path.join(folder, name), "utf8"));
const config = read("config.json");

Object.assign(env, { allowRemoteModels: false, localModelPath: path.dirname(folder) });
const asVit = new PretrainedConfig({ ...config, model_type: "vit" }); // transformers.js does not know vit_simple
const model = await AutoModel.from_pretrained(path.basename(folder), { config: asVit, dtype: "fp32" });

const { pixelValues, width, height } = preprocess(await RawImage.read(file), read("preprocessor_config.json"));
const { logits } = await model({ pixel_values: new Tensor("float32", pixelValues, [1, 3, height, width]) });
const sigmoid = (logit) => 1 / (1 + Math.exp(-logit));
const isMultiLabel = config.problem_type === "multi_label_classification" || logits.data.length === 1;
const ofClasses = isMultiLabel ? Array.from(logits.data, sigmoid) : softmax(logits.data);
const scores = config.problem_type === "regression" ? [...logits.data] : ofClasses; // numbers, or probabilities
const best = scores.indexOf(Math.max(...scores));
console.log(`${path.basename(file)}: ${config.id2label[best]} ${scores[best].toFixed(4)}`);
