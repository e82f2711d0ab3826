// Pictures that last: IndexedDB, or this tab's memory where the browser keeps nothing. Knows no server.

const NAME = "sdtrt";
const THUMBNAIL = 288; // pixels of the longer side

let database = null;
const memory = { facts: new Map(), files: new Map() };

/** Open the store. Returns whether it lasts. */
export async function open() {
  try {
    database = await new Promise((resolve, reject) => {
      const request = indexedDB.open(NAME, 1);
      request.onupgradeneeded = () => {
        request.result.createObjectStore("facts", { keyPath: "id" }).createIndex("created", "created");
        request.result.createObjectStore("files");
      };
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => reject(request.error);
      request.onblocked = () => reject(new Error("another tab has an older store open"));
    });
    database.onversionchange = () => database.close();
    navigator.storage?.persist?.();
    return true;
  } catch {
    return false;
  }
}

function done(transaction) {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
}

function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** Keep a picture: its facts (`id`, `created`, `settings`, ...) with a small picture, and apart from them its file. */
export async function put(facts, file) {
  const kept = { ...facts, bytes: file.size, small: await thumbnail(file) };
  if (database && (await written(kept, file))) return kept;
  memory.facts.set(facts.id, kept);
  memory.files.set(facts.id, file);
  return { ...kept, isFleeting: database !== null };
}

/** Whether there was room for it. */
async function written(facts, file) {
  try {
    const transaction = database.transaction(["facts", "files"], "readwrite");
    transaction.objectStore("facts").put(facts);
    transaction.objectStore("files").put(file, facts.id);
    await done(transaction);
    return true;
  } catch {
    return false;
  }
}

export async function file(id) {
  if (memory.files.has(id) || !database) return memory.files.get(id);
  return result(database.transaction("files").objectStore("files").get(id));
}

/** Facts of the newest pictures before a time, the newest first. */
export async function newest(count, before = Infinity) {
  if (!database) {
    const all = [...memory.facts.values()].filter((one) => one.created < before);
    return all.sort((one, other) => other.created - one.created).slice(0, count);
  }
  const index = database.transaction("facts").objectStore("facts").index("created");
  const request = index.openCursor(IDBKeyRange.upperBound(before, true), "prev");
  return new Promise((resolve, reject) => {
    const found = [];
    request.onerror = () => reject(request.error);
    request.onsuccess = () => {
      const cursor = request.result;
      if (!cursor || found.length === count) return resolve(found);
      found.push(cursor.value);
      cursor.continue();
    };
  });
}

export async function count() {
  const lasting = database ? await result(database.transaction("facts").objectStore("facts").count()) : 0;
  return lasting + memory.facts.size;
}

export async function remove(id) {
  memory.facts.delete(id);
  memory.files.delete(id);
  if (!database) return;
  const transaction = database.transaction(["facts", "files"], "readwrite");
  transaction.objectStore("facts").delete(id);
  transaction.objectStore("files").delete(id);
  await done(transaction);
}

export async function clear() {
  memory.facts.clear();
  memory.files.clear();
  if (!database) return;
  const transaction = database.transaction(["facts", "files"], "readwrite");
  transaction.objectStore("facts").clear();
  transaction.objectStore("files").clear();
  await done(transaction);
}

async function thumbnail(file) {
  const whole = await createImageBitmap(file);
  const scale = Math.min(1, THUMBNAIL / Math.max(whole.width, whole.height));
  if (scale === 1) return file;
  const canvas = new OffscreenCanvas(Math.round(whole.width * scale), Math.round(whole.height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(whole, 0, 0, canvas.width, canvas.height);
  return canvas.convertToBlob({ type: "image/webp", quality: 0.85 });
}
