//! Prints the resource definitions, for `kubectl apply -f -`.

fn main() {
    for (path, yaml) in weir_crds::crd_files() {
        if path.starts_with("crds/") {
            println!("---\n{yaml}");
        }
    }
}
