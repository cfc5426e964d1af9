"Small sets of generated regions and captions in the formats of other projects, with what must come out of each."
import base64
import io
import json
import pickle
import tarfile
from dataclasses import dataclass

import numpy as np

DIM, REGIONS, EACH = 16, 5, 5


@dataclass
class Picture:
    "One generated image."
    number: int
    width: int
    height: int
    vectors: np.ndarray
    boxes: np.ndarray  # pixels
    classes: np.ndarray
    confidences: np.ndarray
    captions: list

    @property
    def name(self): return f"COCO_train2014_{self.number:012d}"

    @property
    def relative(self): return self.boxes/np.array([self.width, self.height]*2, np.float32)

    @property
    def spatial(self):  # width before height
        r = self.relative
        return np.concatenate([r, r[:, [2]] - r[:, [0]], r[:, [3]] - r[:, [1]]], 1)

    @property
    def six(self):  # height before width, as in a region store
        r = self.relative
        return np.concatenate([r, r[:, [3]] - r[:, [1]], r[:, [2]] - r[:, [0]]], 1)


def picture(i, rng):
    "An image whose number is not in the order of the list, wider than high or the other way round."
    width, height = (640, 427 + i) if i % 2 else (333 + i, 500)
    corners = np.sort(rng.random((REGIONS, 2, 2), np.float32), 1)*np.array([width, height], np.float32)
    captions = [f"Caption {k} of picture {i} , a dog ." if k else f"Caption \u201czero\u201d of {i}, caf\u00e9 / x"
                for k in range(EACH)]
    return Picture(900 - 7*i, width, height, rng.random((REGIONS, DIM), np.float32) + np.float32(.01),
                   corners.reshape(REGIONS, 4), rng.integers(0, 6, REGIONS), rng.random(REGIONS, np.float32), captions)


def pictures(count=6, seed=0):
    rng = np.random.default_rng(seed)
    return [picture(i, rng) for i in range(count)]


def b64(a): return base64.b64encode(np.ascontiguousarray(a).tobytes()).decode()


def bottom_up_row(p):
    return "\t".join([str(p.number), str(p.width), str(p.height), str(len(p.boxes)), b64(p.boxes), b64(p.vectors)])


def write_bottom_up(path, of):
    (path/"trainval_36.tsv").write_text("".join(bottom_up_row(p) + "\n" for p in of))
    return path/"trainval_36.tsv"


def write_lxmert(path, of):
    rows = [[p.name, p.height, p.width, b64(p.classes.astype(np.int64)), b64(p.confidences),
             b64(p.classes.astype(np.int64)), b64(p.confidences), len(p.boxes), b64(p.boxes), b64(p.vectors)]
            for p in of]
    (path/"train2014_obj36.tsv").write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    return path


def write_precomp_split(path, name, of, times, boxes=True, each=EACH, ids=None):
    "One split; every row and id `times` times."
    path.mkdir(exist_ok=True)
    ids = [str(p.number) for p in of] if ids is None else ids
    np.save(path/f"{name}_ims.npy", np.repeat(np.stack([p.vectors for p in of]), times, 0))
    (path/f"{name}_ids.txt").write_text("".join(f"{i}\n"*times for i in ids))
    (path/f"{name}_caps.txt").write_text("".join(f"{c}\n" for p in of for c in p.captions[:each]), encoding="utf-8")
    if not boxes: return
    np.save(path/f"{name}_ims_bbx.npy", np.repeat(np.stack([p.boxes for p in of]), times, 0))
    sizes = [dict(image_w=p.width, image_h=p.height) for p in of for _ in range(times)]
    np.save(path/f"{name}_ims_size.npy", np.array(sizes, dtype=object), allow_pickle=True)


def write_precomp(path, of, times=5, **options):
    "Train once an image; dev and test `times` times."
    third = len(of)//3
    write_precomp_split(path, "train", of[:-2*third], 1, **options)
    write_precomp_split(path, "dev", of[-2*third:-third], times, **options)
    write_precomp_split(path, "test", of[-third:], times, **options)
    return path


def write_teran(path, of):
    for name in ("bu_att", "bu_box"): (path/name).mkdir()
    for p in of:
        np.savez_compressed(path/"bu_att"/f"{p.number}.npz", feat=p.vectors)
        np.save(path/"bu_box"/f"{p.number}.npy", p.boxes)
    return path


def uniter_arrays(p):
    return {k: v.astype(np.float16) for k, v in dict(
        features=p.vectors, norm_bb=p.spatial, conf=p.confidences, soft_labels=np.zeros((REGIONS, 7))).items()}


def write_uniter(path, of):
    for p in of: np.savez(path/f"coco_train2014_{p.number:012d}.npz", **uniter_arrays(p))
    return path


def write_milvlg(path, of, transposed=False):
    for p in of:
        info = {} if transposed else dict(info=np.array(dict(image_id=p.name), dtype=object))
        ending = ".jpg.npz" if transposed else ".npz"
        np.savez_compressed(path/f"{p.name}{ending}", x=p.vectors.T if transposed else p.vectors, bbox=p.boxes,
                            num_bbox=len(p.boxes), image_w=p.width, image_h=p.height, **info)
    return path


def write_openvqa(path, of): return write_milvlg(path, of, True)


def write_mmf(path, of):
    for p in of:
        padding = np.zeros((3, DIM), np.float32)
        np.save(path/f"{p.name}.npy", np.concatenate([p.vectors, padding]))
        about = dict(bbox=np.concatenate([p.boxes, np.zeros((3, 4), np.float32)]), num_boxes=REGIONS, objects=p.classes,
                     cls_prob=None, image_width=p.width, image_height=p.height)
        np.save(path/f"{p.name}_info.npy", about, allow_pickle=True)
    return path


def write_oscar(path, of):
    import torch
    third = len(of)//3
    for name, some in dict(train=of[:-2*third], minival=of[-2*third:-third], test=of[-third:]).items():
        torch.save({p.number: torch.from_numpy(np.concatenate([p.vectors, p.six], 1)) for p in some},
                   path/f"{name}_img_frcnn_feats.pt")
        torch.save({p.number: json.dumps(p.captions) for p in some}, path/f"{name}_captions.pt")
    return path


def write_rows_pickle(path, of, rows=None):
    path.write_bytes(pickle.dumps(rows or {p.number: i for i, p in enumerate(of)}, protocol=2))


def write_hdf5_fixed(path, of):
    import h5py
    with h5py.File(path/"train36.hdf5", "w") as f:
        f.update(image_features=np.stack([p.vectors for p in of]), image_bb=np.stack([p.boxes for p in of]),
                 spatial_features=np.stack([p.spatial for p in of]))
    write_rows_pickle(path/"train36_imgid2idx.pkl", of)
    return path


def write_hdf5_adaptive(path, of):
    import h5py
    ends = np.cumsum([len(p.boxes) for p in of])
    with h5py.File(path/"train.hdf5", "w") as f:
        f.update(image_features=np.concatenate([p.vectors for p in of]), image_bb=np.concatenate([p.boxes for p in of]),
                 spatial_features=np.concatenate([p.spatial for p in of]),
                 pos_boxes=np.stack([ends - REGIONS, ends], 1).astype(np.int32))
    write_rows_pickle(path/"train_imgid2idx.pkl", of)
    return path


def write_hdf5_m2(path, of):
    import h5py
    with h5py.File(path/"coco_detections.hdf5", "w") as f:
        for p in of:
            f.update({f"{p.number}_features": p.vectors, f"{p.number}_boxes": p.boxes,
                      f"{p.number}_cls_prob": np.zeros((REGIONS, 7), np.float32)})
    return path


def write_hdf5_volta(path, of):
    import h5py
    with h5py.File(path/"boxes36.h5", "w") as f:
        for p in of:
            f.create_group(p.name).update(features=p.vectors, boxes=p.boxes, img_w=p.width, img_h=p.height,
                                          obj_id=p.classes, obj_conf=p.confidences)
    return path


def write_database(path, values):
    import lmdb
    with lmdb.open(str(path), map_size=1 << 22, lock=False, sync=False) as env, env.begin(write=True) as t:
        for k, v in values.items(): t.put(k.encode(), v)
    return path


def packed(a): return {b"nd": True, b"type": a.dtype.str, b"kind": b"", b"shape": list(a.shape), b"data": a.tobytes()}


def uniter_value(p, compressed):
    import msgpack
    if not compressed: return msgpack.packb({k: packed(v) for k, v in uniter_arrays(p).items()})
    with io.BytesIO() as f:
        np.savez_compressed(f, **uniter_arrays(p), allow_pickle=True)
        return f.getvalue()


def write_lmdb_uniter(path, of, compressed=False):
    names = {f"coco_train2014_{p.number:012d}.npz": p for p in of}
    values = {n: uniter_value(p, compressed) for n, p in names.items()}
    return write_database(path/"feat_th0.2_max100_min10", values | {"__keys__": json.dumps(list(names)).encode()})


def write_lmdb_compressed(path, of): return write_lmdb_uniter(path, of, True)


def vilbert_value(p):
    return dict(image_id=p.number, image_h=p.height, image_w=p.width, num_boxes=REGIONS, boxes=b64(p.boxes).encode(),
                features=b64(p.vectors).encode(), cls_prob=b"")


def volta_value(p):
    return dict(img_id=p.name, img_h=np.int64(p.height), img_w=np.int64(p.width), boxes=p.boxes,
                features=p.vectors, obj_id=p.classes)


def write_lmdb_vilbert(path, of):
    values = {str(p.number): pickle.dumps(vilbert_value(p)) for p in of}
    return write_database(path/"vilbert.lmdb", values | {"keys": pickle.dumps([k.encode() for k in values])})


def write_lmdb_volta(path, of):
    values = {p.name: pickle.dumps(volta_value(p)) for p in of}
    return write_database(path/"volta.lmdb", values | {"keys": pickle.dumps([k.encode() for k in values])})


# name of a layout -> function, name of the reader; layouts with captions of their own are in OWN
FEATURES = {
    "bottom-up": (write_bottom_up, "bottom-up"),
    "lxmert": (write_lxmert, "lxmert"),
    "precomp": (write_precomp, "precomp"),
    "teran": (write_teran, "teran"),
    "precomp-once": (lambda path, of: write_precomp(path, of, times=1), "precomp"),
    "uniter": (write_uniter, "uniter"),
    "milvlg": (write_milvlg, "milvlg"),
    "openvqa": (write_openvqa, "milvlg"),
    "mmf": (write_mmf, "mmf"),
    "oscar": (write_oscar, "oscar"),
    "hdf5-fixed": (write_hdf5_fixed, "hdf5-fixed"),
    "hdf5-adaptive": (write_hdf5_adaptive, "hdf5-adaptive"),
    "hdf5-m2": (write_hdf5_m2, "hdf5-m2"),
    "hdf5-volta": (write_hdf5_volta, "hdf5-volta"),
    "lmdb-uniter": (write_lmdb_uniter, "lmdb-uniter"),
    "lmdb-compressed": (write_lmdb_compressed, "lmdb-uniter"),
    "lmdb-vilbert": (write_lmdb_vilbert, "lmdb-pickle"),
    "lmdb-volta": (write_lmdb_volta, "lmdb-pickle"),
}
OWN = {"precomp", "precomp-once", "oscar"}
HALF = {"uniter", "lmdb-uniter", "lmdb-compressed"}  # float16
CLASSES = {"lxmert", "mmf", "hdf5-volta", "lmdb-volta"}


def write_coco(path, of, name="captions_train2014"):
    "COCO's annotations, their ids in no order."
    notes = [dict(image_id=p.number, id=1000 + 10*i + k, caption=c + "\n")
             for i, p in enumerate(of) for k, c in enumerate(p.captions)]
    order = np.random.default_rng(1).permutation(len(notes)).tolist()
    images = [dict(id=p.number, file_name=f"{p.name}.jpg", width=p.width, height=p.height) for p in of]
    (path/f"{name}.json").write_text(
        json.dumps(dict(info={}, licenses=[], images=images, annotations=[notes[i] for i in order])))
    return path/f"{name}.json"


SPLITS = ("train", "restval", "val", "test")


def write_karpathy(path, of, coco=True, splits=SPLITS):
    images = [dict(filename=f"{p.name if coco else p.number}.jpg", imgid=i, split=splits[i % len(splits)], sentids=[],
                   sentences=[dict(raw=c, tokens=c.lower().split(), imgid=i, sentid=k)
                              for k, c in enumerate(p.captions)])
              | (dict(cocoid=p.number, filepath="train2014") if coco else {})
              for i, p in enumerate(of)]
    (path/"dataset.json").write_text(
        json.dumps(dict(images=images, dataset="coco"), ensure_ascii=False), encoding="utf-8")
    return path/"dataset.json"


def write_blip(path, of):
    "Training and test files in one folder; returns both."
    half = len(of)//2
    train = [dict(image=f"val2014/{p.name}.jpg", caption=c, image_id=f"coco_{p.number}")
             for p in of[:half] for c in p.captions]
    (path/"coco_karpathy_train.json").write_text(json.dumps(train))
    (path/"coco_karpathy_test.json").write_text(
        json.dumps([dict(image=f"val2014/{p.name}.jpg", caption=p.captions) for p in of[half:]]))
    return [path/"coco_karpathy_train.json", path/"coco_karpathy_test.json"]


def write_token(path, of):
    (path/"results_20130124.token").write_text(
        "".join(f"{p.name}.jpg#{k}\t{p.captions[k]}\n" for p in of for k in reversed(range(EACH))), encoding="utf-8")
    return path/"results_20130124.token"


def write_results_csv(path, of, broken=True):
    lines = [f"{p.name}.jpg| {k}| {c}" for p in of for k, c in enumerate(p.captions)]
    if broken: lines[-1] = lines[-1].replace("| 4|", "| 4  ")
    (path/"results.csv").write_text("image_name| comment_number| comment\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path/"results.csv"


def write_table(path, of):
    (path/"own.json").write_text(json.dumps({f"{p.name}.jpg": p.captions for p in of}))
    return path/"own.json"


def write_clip_csv(path, of):
    (path/"clip.csv").write_text(
        "image,caption\n" + "".join(f"{p.name}.jpg,{c}\n" for p in of for c in p.captions), encoding="utf-8")
    return path/"clip.csv"


def hub_table(of):
    import pyarrow as pa
    return pa.table(
        dict(image=[dict(bytes=b"picture", path=f"{p.name}.jpg") for p in of], caption=[p.captions for p in of],
             split=["train"]*len(of), img_id=[str(i) for i in range(len(of))], filename=[f"{p.name}.jpg" for p in of]))


def write_parquet(path, of):
    import pyarrow.parquet as pq
    pq.write_table(hub_table(of), path/"test-00000-of-00001.parquet")
    return path


def write_parquet_rows(path, of):
    "A caption a row, split by the name of the file."
    import pyarrow as pa
    import pyarrow.parquet as pq
    rows = [(p, c) for p in of for c in p.captions]
    table = dict(image=[dict(bytes=b"picture", path=None) for _ in rows], cocoid=[p.number for p, _ in rows],
                 caption=[c for _, c in rows], filename=[f"{p.name}.jpg" for p, _ in rows])
    pq.write_table(pa.table(table), path/"train-00000-of-00001.parquet")
    return path/"train-00000-of-00001.parquet"


def write_arrow(path, of):
    import pyarrow as pa
    with pa.OSFile(str(path/"a.arrow"), "wb") as f, pa.ipc.new_file(f, hub_table(of).schema) as w:
        w.write_table(hub_table(of))
    return path/"a.arrow"


def write_saved(path, of):
    "A folder of the package datasets."
    import pyarrow as pa
    (path/"train").mkdir()
    with (pa.OSFile(str(path/"train"/"data-00000-of-00001.arrow"), "wb") as f,
          pa.ipc.new_stream(f, hub_table(of).schema) as w):
        w.write_table(hub_table(of))
    (path/"dataset_dict.json").write_text('{"splits": ["train"]}')
    return path


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_webdataset(path, of):
    (path/"train").mkdir()
    members = [(f"{p.name}.{ending}", content)
               for p in of for ending, content in (("jpg", b"picture"), ("txt", "\n".join(p.captions).encode()))]
    write_tar(path/"train"/"0.tar", members)
    return path


CAPTIONS = {"coco": write_coco,
            "karpathy": write_karpathy,
            "blip": write_blip,
            "token": write_token,
            "results-csv": write_results_csv,
            "table": write_table,
            "clip-csv": write_clip_csv,
            "parquet": write_parquet,
            "parquet-rows": write_parquet_rows,
            "arrow": write_arrow,
            "datasets": write_saved,
            "webdataset": write_webdataset}
READER_OF = {"clip-csv": "table", "parquet-rows": "parquet", "datasets": "arrow"}
