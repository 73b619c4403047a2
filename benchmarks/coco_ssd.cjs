// Detections of SSD-MobileNetV2 (COCO) for RGB images that stdin brings one after another.
// node coco_ssd.cjs MODEL_FOLDER HEIGHT WIDTH MIN_SCORE; a JSON line per image goes out.
const fs = require("fs");
const path = require("path");
const { createRequire } = require("module");
const from = createRequire(path.join(process.cwd(), "package.json"));
const tf = from("@tensorflow/tfjs-core");
const wasm = from("@tensorflow/tfjs-backend-wasm");
from("@tensorflow/tfjs-backend-cpu");
const cocoSsd = from("@tensorflow-models/coco-ssd");

function model(folder) {
  const { modelTopology, weightsManifest } = JSON.parse(
    fs.readFileSync(path.join(folder, "model.json")),
  );
  const shards = weightsManifest.flatMap((group) => group.paths);
  const bytes = Buffer.concat(shards.map((name) => fs.readFileSync(path.join(folder, name))));
  const weightSpecs = weightsManifest.flatMap((group) => group.weights);
  const weightData = new Uint8Array(bytes).buffer;
  return tf.io.fromMemory({ modelTopology, weightSpecs, weightData });
}

async function main(folder, height, width, minScore) {
  wasm.setWasmPaths(path.dirname(from.resolve("@tensorflow/tfjs-backend-wasm")) + path.sep);
  await tf.setBackend("wasm");
  const detector = await cocoSsd.load({ modelUrl: model(folder) });
  const images = fs.readFileSync(0);
  const size = height * width * 3;
  for (let start = 0; start < images.length; start += size) {
    const pixels = tf.tensor3d(images.subarray(start, start + size), [height, width, 3], "int32");
    console.log(JSON.stringify(await detector.detect(pixels, 20, minScore)));
    pixels.dispose();
  }
}

const [folder, ...numbers] = process.argv.slice(2);
main(folder, ...numbers.map(Number));
