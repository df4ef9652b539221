// Greedy tokens of a GGUF file by node-llama-cpp, for benchmarks/ops_decode.py:
//   node decode_llama.mjs FOLDER_OF_NODE_MODULES MODEL.gguf TOKENS THREADS  ->  {"speed": tokens per second, "tokens": [...]}
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const [, , folder, path, count, threads] = process.argv;
const entry = createRequire(folder + "/").resolve("node-llama-cpp");
const {getLlama} = await import(pathToFileURL(entry));
const llama = await getLlama({gpu: false, build: "never", progressLogs: false, logLevel: "error", maxThreads: Number(threads)});
const model = await llama.loadModel({modelPath: path});
const context = await model.createContext({contextSize: 1024, threads: Number(threads), sequences: 1});
const alone = Number(threads) === 1;  // then CPU time counts, as in ops.py
const clock = () => { const used = process.cpuUsage(); return alone ? (used.user + used.system) / 1e6 : performance.now() / 1e3; };
const tokens = [];
let start;
for await (const token of context.getSequence().evaluate([0, 0, 0, 0], {temperature: 0, yieldEogToken: true})) {
    if (tokens.length === 4) start = clock();
    tokens.push(token);
    if (tokens.length === Number(count)) break;
}
console.log(JSON.stringify({speed: (tokens.length - 5) / (clock() - start), tokens}));
process.exit(0);
