// The pixels of an image as the checkpoint's image processor makes them in Python, and what its outputs mean, for
// browsers and Node.
//
// Browsers resize in other ways than Pillow, and a model that was trained on Pillow's pixels notices. So this does what
// Pillow does, in the same integer arithmetic: first each row, then each column, with weights of 22 bits.

const FILTERS = {
  2: [1, (x) => Math.max(0, 1 - x)], // bilinear; the keys are those of PIL.Image.Resampling
  3: [2, (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0)], // bicubic
};
const BITS = 22;

/** For each of `newSize` pixels: the first of the `size` old ones that it covers, and their integer weights. */
function coefficients(size, newSize, resample) {
  const [support, filter] = FILTERS[resample];
  const scale = size / newSize, stretch = Math.max(scale, 1); // a smaller image averages: antialiasing
  return Array.from({ length: newSize }, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support * stretch + 0.5));
    const last = Math.min(size, Math.trunc(center + support * stretch + 0.5));
    const weights = Array.from({ length: last - first }, (_, k) => filter(Math.abs((first + k - center + 0.5) / stretch)));
    const sum = weights.reduce((total, weight) => total + weight, 0);
    return [first, weights.map((weight) => Math.round((weight / sum) * 2 ** BITS))];
  });
}

/** Resizes one axis of interleaved RGB: `lines` lines of `size` pixels, which are `step` bytes apart. */
function resizeAxis(source, target, lines, size, newSize, [line, step], [newLine, newStep], resample) {
  coefficients(size, newSize, resample).forEach(([first, weights], i) => {
    for (let j = 0; j < lines; j++) {
      for (let channel = 0; channel < 3; channel++) {
        let sum = 2 ** (BITS - 1);
        for (let k = 0, at = j * line + first * step + channel; k < weights.length; k++, at += step) sum += source[at] * weights[k];
        target[j * newLine + i * newStep + channel] = Math.min(255, Math.max(0, sum >> BITS));
      }
    }
  });
  return target;
}

/** Interleaved RGB bytes, resized as by PIL.Image.resize; `resample` is 2 (bilinear) or 3 (bicubic). */
export function resize(rgb, width, height, newWidth, newHeight, resample) {
  if (newWidth !== width) {
    const target = new Uint8Array(newWidth * height * 3);
    rgb = resizeAxis(rgb, target, height, width, newWidth, [3 * width, 3], [3 * newWidth, 3], resample);
  }
  if (newHeight !== height) {
    const target = new Uint8Array(newWidth * newHeight * 3);
    rgb = resizeAxis(rgb, target, newWidth, height, newHeight, [3, 3 * newWidth], [3, 3 * newWidth], resample);
  }
  return rgb;
}

/** The size before the crop, and the crop: {width, height, left, top, cropWidth, cropHeight}. */
export function layout(width, height, { size, do_center_crop, crop_size }) {
  let resized = size;
  if (size.shortest_edge) {
    const short = Math.min(width, height), longest = Math.trunc((size.shortest_edge * Math.max(width, height)) / short);
    resized = width <= height ? { width: size.shortest_edge, height: longest } : { width: longest, height: size.shortest_edge };
  }
  const crop = do_center_crop ? crop_size : resized;
  const left = Math.floor((resized.width - crop.width) / 2), top = Math.floor((resized.height - crop.height) / 2);
  return { width: resized.width, height: resized.height, left, top, cropWidth: crop.width, cropHeight: crop.height };
}

/**
 * What the image processor makes of an image.
 * @param image {data, width, height, channels}: interleaved bytes; with four channels, the fourth is ignored
 * @param processor the content of preprocessor_config.json
 * @returns {rgb, width, height, pixelValues}: interleaved bytes, and normalized floats of shape (3, height, width)
 */
export function preprocess({ data, width, height, channels }, processor) {
  let rgb = new Uint8Array(width * height * 3);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) rgb[3 * i + c] = data[channels * i + Math.min(c, channels - 1)];
  }
  const { left, top, cropWidth, cropHeight, ...resized } = layout(width, height, processor);
  rgb = resize(rgb, width, height, resized.width, resized.height, processor.resample);
  const cropped = new Uint8Array(cropWidth * cropHeight * 3);
  for (let y = 0; y < cropHeight; y++) {
    const start = 3 * ((top + y) * resized.width + left);
    cropped.set(rgb.subarray(start, start + 3 * cropWidth), 3 * y * cropWidth);
  }
  const area = cropWidth * cropHeight, pixelValues = new Float32Array(3 * area);
  const { rescale_factor: factor, image_mean: mean, image_std: std } = processor;
  for (let c = 0; c < 3; c++) {
    for (let i = 0; i < area; i++) pixelValues[c * area + i] = (cropped[3 * i + c] * factor - mean[c]) / std[c];
  }
  return { rgb: cropped, width: cropWidth, height: cropHeight, pixelValues };
}

/** The probabilities of the labels as a pipeline computes them, or the numbers of a regression, from the model's outputs. */
export function probabilities(logits, problemType) {
  logits = [...logits];
  if (problemType === "regression") return logits;
  if (problemType === "multi_label_classification" || logits.length === 1) return logits.map((logit) => 1 / (1 + Math.exp(-logit)));
  const largest = Math.max(...logits), powers = logits.map((logit) => Math.exp(logit - largest));
  const sum = powers.reduce((total, power) => total + power, 0);
  return powers.map((power) => power / sum);
}
